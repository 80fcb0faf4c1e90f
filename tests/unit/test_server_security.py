"""Options of the server's protection: what they become, and what is refused."""

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server import AdminKey, Security, ServerUsageError, ServingTls
from server.controls import controls, first_writable
from server.ports import Addresses
from server.security import exposure_warning, known_options
from tests.unit.certificate_files import Pair, authority, issued

KEY = "0123456789abcdef0123"
NEWER = frozenset({"allow-sagemaker", "allow-vertex-ai", "allow-client-shm", "http-max-input-size"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Pair:
    return authority(folder, "ca")


@pytest.fixture(scope="module")
def pair(folder: Path, ca: Pair) -> Pair:
    return issued(folder, ca, "server", "DNS:vit.example.com,IP:10.0.0.1")


@pytest.fixture
def tls(pair: Pair) -> ServingTls:
    return ServingTls(pair.certificate, pair.key)


@pytest.fixture
def production(tls: ServingTls) -> Security:
    return Security(production=True, tls=tls, admin_key=AdminKey(KEY))


def key_file(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "admin.key"
    path.write_text(text)
    path.chmod(mode)
    return path


# An address that our own calls use, and their headers.
CALLED = ("127.0.0.1:1", {})


def refusal(call, *arguments, **options) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(ServerUsageError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# --- the key -----------------------------------------------------------------------------------


def test_the_key_is_the_files_only_line_and_shows_nowhere(tmp_path: Path, tls: ServingTls):
    key = AdminKey.read(key_file(tmp_path, f"{KEY}\n"))
    assert key.value == KEY
    assert key.grpc_headers == {"triton-grpc-protocol-admin-key": KEY}
    assert KEY not in repr(Security(production=True, tls=tls, admin_key=key))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644])
def test_a_key_file_that_others_can_use_is_refused(tmp_path: Path, mode: int):
    path = key_file(tmp_path, KEY, mode)
    message = refusal(AdminKey.read, path)
    assert f"{path} can be read or written by others" in message and "chmod 600" in message


UNSAFE = "one line of printable ASCII without blanks and without , : ="


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *((f"{KEY}{sign}{KEY}".encode(), UNSAFE) for sign in ",:= \t\n\r\v\0\x7f"),
        *((text.encode(), UNSAFE) for text in (f" {KEY}", f"{KEY} ", KEY + "é")),
        (b"", "is empty; make one with"),
        (b"\n", "is empty; make one with"),
        (b"letmein", "has 7 characters"),
        (b"\xff\xfe\x00", "cannot be read (not a text file)"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused_and_not_repeated(
    tmp_path: Path, content: bytes, said: str
):
    path = key_file(tmp_path, "")
    path.write_bytes(content)
    message = refusal(AdminKey.read, path)
    assert said in message and KEY not in message and "letmein" not in message


def test_a_key_file_that_is_none_is_refused(tmp_path: Path):
    missing = refusal(AdminKey.read, tmp_path / "nowhere")
    assert "cannot be read (No such file or directory)" in missing
    assert "cannot be read (Is a directory)" in refusal(AdminKey.read, tmp_path)


# --- arguments ---------------------------------------------------------------------------------


def test_models_are_fixed_unless_they_can_be_loaded_and_a_key_restricts_both_protocols():
    assert Security().arguments() == ["--model-control-mode=none"]
    reload = ["--model-control-mode=explicit", "--load-model=*"]
    assert Security(allow_reload=True).arguments() == reload
    setting = f"model-repository,trace,logging,shared-memory:admin-key={KEY}"
    assert Security(admin_key=AdminKey(KEY)).arguments()[1:] == [
        f"--grpc-restricted-protocol={setting}",
        f"--http-restricted-api={setting}",
    ]


def test_tls_files_are_absolute_because_the_server_starts_elsewhere(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    one_sided = ServingTls(Path("a.crt"), Path("a.key")).arguments()
    assert one_sided == [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={tmp_path}/a.crt",
        f"--grpc-server-key={tmp_path}/a.key",
    ]
    mutual = ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={tmp_path}/ca.crt"]
    both = ServingTls(Path("a.crt"), Path("a.key"), Path("ca.crt")).arguments()
    assert both == [*one_sided, *mutual]


def test_production_shuts_shared_memory_with_a_key_that_nobody_has(tls: ServingTls):
    """No client library sends a line break, and nobody can guess the rest."""
    arguments = Security(production=True, tls=tls, admin_key=AdminKey(KEY)).arguments()
    for flag in ("--grpc-restricted-protocol", "--http-restricted-api"):
        (shut,) = [each for each in arguments if each.startswith(f"{flag}=shared-memory:")]
        assert re.fullmatch(f"{flag}=shared-memory:switched-off=switched\r\n[0-9a-f]{{64}}", shut)
        assert f"{flag}=model-repository,trace,logging,statistics:admin-key={KEY}" in arguments


def test_production_uses_what_this_tritonserver_has_and_nothing_else(tls: ServingTls):
    security = Security(production=True, tls=tls, admin_key=AdminKey(KEY))
    old, new = security.arguments(), security.arguments(NEWER)
    assert set(new) - set(old) == {
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        "--allow-client-shm=false",
        "--http-max-input-size=67108864",
    }
    for argument in ("--strict-readiness=true", "--exit-on-error=true", "--log-verbose=0"):
        assert argument in old


def test_options_are_read_from_help(tmp_path: Path):
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\nprintf '  --http-port <integer>\\n\\tLike --not-one.\\n' >&2\n")
    binary.chmod(0o755)
    assert known_options(binary, os.environ) == {"http-port"}
    assert known_options(tmp_path / "nowhere", os.environ) == frozenset()


# --- addresses ---------------------------------------------------------------------------------


def test_in_production_http_and_metrics_stay_on_loopback_whatever_the_host(production: Security):
    assert production.addresses("0.0.0.0") == Addresses(grpc="0.0.0.0")
    assert production.addresses("::1") == Addresses("::1", "::1", "::1")
    told = dataclasses.replace(production, http_host="10.0.0.1", metrics_host="10.0.0.2")
    assert told.addresses("0.0.0.0") == Addresses("10.0.0.1", "0.0.0.0", "10.0.0.2")
    assert Security().addresses("127.0.0.1") == Addresses()
    assert Security().addresses("0.0.0.0") == Addresses("0.0.0.0", "0.0.0.0", "0.0.0.0")


@pytest.mark.parametrize(
    ("host", "is_exposed"),
    [
        *((host, False) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost")),
        *((host, True) for host in ("0.0.0.0", "::", "10.0.0.1", "some.host")),
    ],
)
def test_other_addresses_than_loopback_are_warned_about_in_one_line(
    production: Security, host: str, is_exposed: bool
):
    warning = exposure_warning(Security(), Security().addresses(host))
    assert (warning is not None) is is_exposed
    if warning is not None:
        assert warning.startswith(f"{host} can be reached from other machines")
        assert "--production" in warning and "\n" not in warning
    assert exposure_warning(production, production.addresses(host)) is None


def test_models_cannot_be_made_loadable_by_everybody():
    message = refusal(Security(allow_reload=True).addresses, "0.0.0.0")
    assert "would let everyone who reaches it load models" in message
    assert "--admin-key-file" in message
    assert Security(allow_reload=True).addresses("127.0.0.1") == Addresses()
    keyed = Security(allow_reload=True, admin_key=AdminKey(KEY))
    assert keyed.addresses("0.0.0.0").grpc == "0.0.0.0"


# --- what is refused ---------------------------------------------------------------------------


def test_production_needs_tls_and_a_key_and_the_ways_to_get_them_work(
    tmp_path: Path, tls: ServingTls
):
    message = refusal(Security, production=True, admin_key=AdminKey(KEY))
    assert "gRPC over TLS only" in message
    recipe = message.partition("made with: ")[2]
    subprocess.run(recipe.split(), cwd=tmp_path, check=True, capture_output=True)
    made = ServingTls(tmp_path / "tls.crt", tmp_path / "tls.key")
    assert made.access(*CALLED).name == "localhost"
    message = refusal(Security, production=True, tls=tls, allow_reload=True)
    recipe = message.partition("give --admin-key-file, made with: ")[2]
    subprocess.run(["sh", "-c", recipe], cwd=tmp_path, check=True)
    key = AdminKey.read(tmp_path / "admin.key")
    assert len(key.value) == 64
    Security(production=True, tls=tls, admin_key=key, allow_reload=True)


C, K, CA, OWN_C, OWN_K = (Path(f"{name}.pem") for name in "abcde")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((C, None, None, None, None), "--tls-cert needs --tls-key"),
        ((None, K, None, None, None), "--tls-key needs --tls-cert"),
        ((None, None, CA, None, None), "--tls-client-ca needs --tls-cert and --tls-key"),
        ((C, K, CA, None, OWN_K), "--tls-own-key needs --tls-own-cert"),
        ((C, K, CA, OWN_C, None), "--tls-own-cert needs --tls-own-key"),
        ((C, K, None, OWN_C, OWN_K), "--tls-own-cert is for --tls-client-ca; give both or neither"),
    ],
)
def test_options_that_need_each_other_are_told_so(files: tuple[Path | None, ...], message: str):
    assert refusal(ServingTls.of_options, *files) == message


def test_options_become_the_files_of_the_port():
    assert ServingTls.of_options(None, None, None, None, None) is None
    assert ServingTls.of_options(C, K, CA, OWN_C, OWN_K) == ServingTls(C, K, CA, OWN_C, OWN_K)


# --- the files of TLS --------------------------------------------------------------------------


def test_our_own_calls_ask_for_a_name_that_the_certificate_holds(folder: Path, ca: Pair):
    for number, (names, asked) in enumerate(
        {
            "DNS:vit.example.com,IP:10.0.0.1": "vit.example.com",
            "DNS:*.example.com": "check.example.com",
            "IP:10.0.0.1": "10.0.0.1",
        }.items()
    ):
        made = issued(folder, ca, f"named-{number}", names)
        assert ServingTls(made.certificate, made.key).access(*CALLED).name == asked


@pytest.fixture(scope="module")
def files(folder: Path, ca: Pair, pair: Pair) -> dict[str, Path]:
    """The files of the table below, by name."""
    (folder / "text").write_text("no certificate")
    encrypt = ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret", "-in", pair.key]
    subprocess.run([*encrypt, "-out", folder / "locked"], check=True)
    old = issued(folder, ca, "old", "DNS:old.example.com", days=-1)
    other = authority(folder, "other")
    own = issued(folder, other, "own", "DNS:own")
    return {
        "crt": pair.certificate,
        "key": pair.key,
        "ca": ca.certificate,
        "ca key": ca.key,
        "other": other.certificate,
        "own": own.certificate,
        "own key": own.key,
        "text": folder / "text",
        "locked": folder / "locked",
        "nowhere": folder / "nowhere",
        "old": old.certificate,
        "old key": old.key,
    }


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("crt", "ca key"), "{ca key} is not the private key of the certificate {crt}"),
        (("text", "key"), "are not a PEM certificate"),
        (("crt", "text"), "are not a PEM certificate"),
        (("crt", "key", "text"), "{text} is not a PEM certificate"),
        (("nowhere", "key"), "{nowhere} cannot be read (No such file"),
        (("crt", "nowhere"), "{nowhere} cannot be read (No such file"),
        (("crt", "key", "nowhere"), "{nowhere} cannot be read (No such file"),
        (("crt", "locked"), "its unencrypted key"),  # Instead of asking at the terminal.
        (("old", "old key"), "is not valid (certificate has expired)"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(files: dict, names: tuple, said: str):
    tls = ServingTls(*(files[name] for name in names))
    assert said.format_map(files) in refusal(tls.access, *CALLED)


def test_a_client_authority_must_accept_our_own_certificate(files: dict):
    def tls(*names: str) -> ServingTls:
        return ServingTls(*(files[name] for name in names))

    message = refusal(tls("crt", "key", "other").access, *CALLED)
    assert f"{files['other']} does not accept the certificate of our own checks" in message
    assert "--tls-own-cert" in message
    tls("crt", "key", "other", "own", "own key").access(*CALLED)
    tls("crt", "key", "ca").access(*CALLED)


# --- what --production prints ------------------------------------------------------------------


def states(security: Security, **changes: object) -> dict[str, bool]:
    now = {
        "repository": Path("/proc/self"),
        "addresses": Addresses(grpc="0.0.0.0"),
        "triton_version": "2.69.0",
        "known_options": NEWER,
    }
    listed = controls(security, **{**now, **changes})
    assert [control.is_on for control in listed] == sorted(
        (control.is_on for control in listed), reverse=True
    )
    assert all(control.detail and "\n" not in control.detail for control in listed)
    return {control.name: control.is_on for control in listed}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"triton_version": "2.51.0"}, "Triton's fixes"),
        ({"known_options": frozenset()}, "HTTP request size"),
        ({"addresses": Addresses(http="0.0.0.0")}, "HTTP on loopback"),
        ({"addresses": Addresses(metrics="0.0.0.0")}, "metrics on loopback"),
    ],
)
def test_what_could_not_be_turned_on_is_listed(production: Security, changes: dict, name: str):
    assert states(production)[name] is True
    assert states(production, **changes)[name] is False


@pytest.mark.parametrize(
    ("options", "is_hidden"),
    [
        (["rw,relatime"], False),
        (["rw,hidepid=2"], True),
        (["rw,gid=9,hidepid=invisible"], True),
        (["rw,hidepid=0"], False),
        (["rw,hidepid=off"], False),
        (["rw,hidepid=2", "rw"], False),
    ],
)
def test_the_key_counts_as_hidden_where_the_kernel_hides_arguments(
    production: Security, tmp_path: Path, options: list[str], is_hidden: bool
):
    mounts = tmp_path / "mounts"
    lines = ["tmpfs /run tmpfs rw,hidepid=2 0 0", *(f"proc /proc proc {o} 0 0" for o in options)]
    mounts.write_text("".join(f"{line}\n" for line in lines))
    assert states(production, mounts=mounts)["hidden admin key"] is is_hidden


def test_choices_that_weaken_production_are_listed(production: Security, ca: Pair):
    weak = states(production)
    assert weak["TLS for HTTP"] is weak["gRPC request size"] is False
    assert (weak["client certificates"], weak["fixed models"]) == (False, True)
    assert states(dataclasses.replace(production, allow_reload=True))["fixed models"] is False
    mutual = dataclasses.replace(production.tls, client_ca=ca.certificate)
    assert states(dataclasses.replace(production, tls=mutual))["client certificates"] is True


def test_a_tls_key_that_everyone_reads_is_listed(production: Security, tmp_path: Path):
    assert states(production)["private TLS key"] is True
    key = tmp_path / "tls.key"
    key.write_bytes(production.tls.key.read_bytes())
    key.chmod(0o644)
    opened = dataclasses.replace(production, tls=dataclasses.replace(production.tls, key=key))
    assert states(opened)["private TLS key"] is False


@contextmanager
def as_a_plain_user() -> Iterator[None]:
    """Root may write everywhere; anybody else stays who they are."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_writable_file_in_the_repository_is_found():
    with tempfile.TemporaryDirectory() as name:  # tmp_path is for its owner's eyes only.
        repository = Path(name)
        model = repository / "model.py"
        model.touch(mode=0o444)
        repository.chmod(0o555)
        with as_a_plain_user():
            assert first_writable(repository) is None
        model.chmod(0o666)
        with as_a_plain_user():
            assert first_writable(repository) == model
        repository.chmod(0o755)
