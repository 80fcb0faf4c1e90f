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


def test_the_key_is_the_files_only_line(tmp_path: Path):
    key = AdminKey.read(key_file(tmp_path, f"{KEY}\n"))
    assert key.value == KEY
    assert key.grpc_headers == {"triton-grpc-protocol-admin-key": KEY}


def test_no_secret_shows_when_the_options_are_printed(tmp_path: Path, tls: ServingTls):
    key = AdminKey.read(key_file(tmp_path, KEY))
    security = Security(production=True, tls=tls, admin_key=key)
    assert KEY not in repr(security)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644])
def test_a_key_file_that_others_can_use_is_refused(tmp_path: Path, mode: int):
    path = key_file(tmp_path, KEY, mode)
    message = refusal(AdminKey.read, path)
    assert f"{path} can be read or written by others" in message and "chmod 600" in message


@pytest.mark.parametrize(
    "text",
    [
        *(f"{KEY}{sign}{KEY}" for sign in ",:= \t\n\r\v\0\x7f"),
        f" {KEY}",
        f"{KEY} ",
        KEY + "é",
    ],
)
def test_a_key_that_would_break_tritonservers_option_is_refused(tmp_path: Path, text: str):
    message = refusal(AdminKey.read, key_file(tmp_path, text))
    assert "one line of printable ASCII without blanks and without , : =" in message
    assert KEY not in message


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_key_file_is_refused(tmp_path: Path, text: str):
    assert "is empty; make one with" in refusal(AdminKey.read, key_file(tmp_path, text))


def test_a_key_that_can_be_guessed_is_refused(tmp_path: Path):
    message = refusal(AdminKey.read, key_file(tmp_path, "letmein"))
    assert "has 7 characters" in message and "letmein" not in message


def test_a_key_file_that_is_none_is_refused(tmp_path: Path):
    missing = refusal(AdminKey.read, tmp_path / "nowhere")
    assert "cannot be read (No such file or directory)" in missing
    assert "cannot be read (Is a directory)" in refusal(AdminKey.read, tmp_path)
    binary = key_file(tmp_path, "")
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read (not a text file)" in refusal(AdminKey.read, binary)


# --- arguments ---------------------------------------------------------------------------------


def test_without_options_only_the_models_are_fixed():
    assert Security().arguments() == ["--model-control-mode=none"]
    assert Security().addresses("127.0.0.1") == Addresses()


def test_allow_reload_loads_everything_under_explicit_control():
    arguments = Security(allow_reload=True).arguments()
    assert arguments == ["--model-control-mode=explicit", "--load-model=*"]


def test_tls_files_are_absolute_because_the_server_starts_elsewhere(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    arguments = ServingTls(Path("a.crt"), Path("a.key"), Path("ca.crt")).arguments()
    assert arguments == [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={tmp_path}/a.crt",
        f"--grpc-server-key={tmp_path}/a.key",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-root-cert={tmp_path}/ca.crt",
    ]
    assert "--grpc-use-ssl-mutual=true" not in ServingTls(Path("a.crt"), Path("a.key")).arguments()


def test_a_key_restricts_both_protocols_alike():
    setting = f"model-repository,trace,logging,shared-memory:admin-key={KEY}"
    assert Security(admin_key=AdminKey(KEY)).arguments()[1:] == [
        f"--grpc-restricted-protocol={setting}",
        f"--http-restricted-api={setting}",
    ]


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


def test_in_production_http_and_metrics_stay_on_loopback_whatever_the_host(tls: ServingTls):
    production = Security(production=True, tls=tls, admin_key=AdminKey(KEY))
    assert production.addresses("0.0.0.0") == Addresses(grpc="0.0.0.0")
    assert production.addresses("::1") == Addresses("::1", "::1", "::1")
    told = dataclasses.replace(production, http_host="10.0.0.1", metrics_host="10.0.0.2")
    assert told.addresses("0.0.0.0") == Addresses("10.0.0.1", "0.0.0.0", "10.0.0.2")
    assert Security().addresses("0.0.0.0") == Addresses("0.0.0.0", "0.0.0.0", "0.0.0.0")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_is_no_exposure(host: str):
    assert exposure_warning(Security(), Security().addresses(host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "some.host"])
def test_other_addresses_are_warned_about_in_one_line(tls: ServingTls, host: str):
    warning = exposure_warning(Security(), Security().addresses(host))
    assert warning is not None and warning.startswith(f"{host} can be reached from other machines")
    assert "--production" in warning and "\n" not in warning
    production = Security(production=True, tls=tls, admin_key=AdminKey(KEY))
    assert exposure_warning(production, production.addresses(host)) is None


def test_models_cannot_be_made_loadable_by_everybody():
    message = refusal(Security(allow_reload=True).addresses, "0.0.0.0")
    assert "would let everyone who reaches it load models" in message
    assert "--admin-key-file" in message
    assert Security(allow_reload=True).addresses("127.0.0.1") == Addresses()
    keyed = Security(allow_reload=True, admin_key=AdminKey(KEY))
    assert keyed.addresses("0.0.0.0").grpc == "0.0.0.0"


# --- what is refused ---------------------------------------------------------------------------


def test_production_needs_tls_and_a_key_and_says_how_to_get_them(tls: ServingTls):
    message = refusal(Security, production=True, admin_key=AdminKey(KEY))
    assert "gRPC over TLS only" in message and "openssl req -x509" in message
    message = refusal(Security, production=True, tls=tls, allow_reload=True)
    assert "give --admin-key-file, made with: (umask 077; openssl rand" in message
    Security(production=True, tls=tls, admin_key=AdminKey(KEY), allow_reload=True)


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


def test_the_way_to_a_test_certificate_works(tmp_path: Path):
    message = refusal(Security, production=True)
    recipe = message.partition("made with: ")[2]
    subprocess.run(recipe.split(), cwd=tmp_path, check=True, capture_output=True)
    assert (
        ServingTls(tmp_path / "tls.crt", tmp_path / "tls.key").access(*CALLED).name == "localhost"
    )


def test_the_way_to_a_key_works(tmp_path: Path, tls: ServingTls):
    message = refusal(Security, production=True, tls=tls)
    recipe = message.partition("made with: ")[2]
    subprocess.run(["sh", "-c", recipe], cwd=tmp_path, check=True)
    assert len(AdminKey.read(tmp_path / "admin.key").value) == 64


# --- the files of TLS --------------------------------------------------------------------------


def refused(tls: ServingTls) -> str:
    """Why our own calls cannot be made with these files."""
    return refusal(tls.access, *CALLED)


def test_our_own_calls_ask_for_a_name_that_the_certificate_holds(
    folder: Path, ca: Pair, tls: ServingTls
):
    assert tls.access(*CALLED).name == "vit.example.com"
    wild = issued(folder, ca, "wild", "DNS:*.example.com")
    assert ServingTls(wild.certificate, wild.key).access(*CALLED).name == "check.example.com"
    address = issued(folder, ca, "address", "IP:10.0.0.1")
    assert ServingTls(address.certificate, address.key).access(*CALLED).name == "10.0.0.1"


def test_a_key_of_another_certificate_is_refused(pair: Pair, ca: Pair):
    message = refused(ServingTls(pair.certificate, ca.key))
    assert f"{ca.key} is not the private key of the certificate {pair.certificate}" in message


def test_files_that_are_no_pem_or_not_there_are_refused(tmp_path: Path, pair: Pair):
    text = tmp_path / "text"
    text.write_text("no certificate")
    assert "are not a PEM certificate" in refused(ServingTls(text, pair.key))
    assert "are not a PEM certificate" in refused(ServingTls(pair.certificate, text))
    missing = tmp_path / "nowhere"
    for files in (
        (missing, pair.key),
        (pair.certificate, missing),
        (*vars(pair).values(), missing),
    ):
        assert f"{missing} cannot be read (No such file" in refused(ServingTls(*files))
    assert f"{text} is not a PEM certificate" == refused(
        ServingTls(pair.certificate, pair.key, text)
    )


def test_an_encrypted_key_is_refused_instead_of_asking_at_the_terminal(tmp_path: Path, pair: Pair):
    locked = tmp_path / "locked.key"
    encrypt = ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret"]
    subprocess.run([*encrypt, "-in", pair.key, "-out", locked], check=True)
    assert "its unencrypted key" in refused(ServingTls(pair.certificate, locked))


def test_a_certificate_out_of_date_is_refused(folder: Path, ca: Pair):
    old = issued(folder, ca, "old", "DNS:old.example.com", days=-1)
    assert "is not valid (certificate has expired)" in refused(ServingTls(old.certificate, old.key))


def test_a_client_authority_must_accept_our_own_certificate(folder: Path, ca: Pair, pair: Pair):
    other = authority(folder, "other")
    own = issued(folder, other, "own", "DNS:own")
    message = refused(ServingTls(pair.certificate, pair.key, other.certificate))
    assert f"{other.certificate} does not accept the certificate of our own checks" in message
    assert "--tls-own-cert" in message
    ServingTls(pair.certificate, pair.key, other.certificate, own.certificate, own.key).access(
        "127.0.0.1:1", {}
    )
    ServingTls(pair.certificate, pair.key, ca.certificate).access(*CALLED)


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


@pytest.fixture
def production(tls: ServingTls) -> Security:
    return Security(production=True, tls=tls, admin_key=AdminKey(KEY))


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
