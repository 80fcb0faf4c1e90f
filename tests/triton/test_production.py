"""Who may do what: every protection is tried on a real tritonserver, from both sides."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from server import AdminKey, Security, ServingTls, TritonServer
from tests.servers import add_model, running
from tests.triton.test_server import ROOT, command, refused
from tests.unit.certificate_files import Pair, authority, issued

KEY = "a-key-that-nobody-guesses-4711"
NAMES = "DNS:localhost,IP:127.0.0.1,IP:127.0.0.2"
# What Triton might make of the value with a line break in it that stands for "nobody".
NEARLY_SWITCHED_OFF = ("", "switched", "off", "switchedoff", "switched off", KEY)
GRPC, HTTP = "triton-grpc-protocol-", ""
RIGHT = {f"{GRPC}admin-key": KEY}


def wrong(protocol: str) -> list[dict[str, str]]:
    """Headers of a protocol's requests that open nothing."""
    other = HTTP if protocol else GRPC
    return [
        {},
        *({f"{protocol}admin-key": value} for value in ("wrong", KEY + "x", KEY[:-1], "")),
        {f"{other}admin-key": KEY},
        *({f"{protocol}switched-off": value} for value in NEARLY_SWITCHED_OFF),
    ]


SHARED_MEMORY = {
    "register": lambda c, h: c.register_system_shared_memory("a", "/a", 64, headers=h),
    "unregister": lambda c, h: c.unregister_system_shared_memory("a", headers=h),
    "regions": lambda c, h: c.get_system_shared_memory_status(headers=h),
    "register cuda": lambda c, h: c.register_cuda_shared_memory("a", b"YWFh", 0, 64, headers=h),
    "cuda regions": lambda c, h: c.get_cuda_shared_memory_status(headers=h),
}
ADMIN = {
    "load": lambda c, h: c.load_model("vit_high", headers=h),
    "load with files": lambda c, h: c.load_model(
        "vit_high", headers=h, config="{}", files={"file:1/model.onnx": b"x"}
    ),
    "unload": lambda c, h: c.unload_model("vit_high", headers=h),
    "index": lambda c, h: c.get_model_repository_index(headers=h),
    "trace": lambda c, h: c.get_trace_settings(headers=h),
    "trace of a model": lambda c, h: c.get_trace_settings("router", headers=h),
    "set trace": lambda c, h: c.update_trace_settings(
        settings={"trace_level": ["TENSORS"]}, headers=h
    ),
    "log": lambda c, h: c.get_log_settings(headers=h),
    "set log": lambda c, h: c.update_log_settings({"log_verbose_level": 1}, headers=h),
}
LOAD = "/v2/repository/models/vit_high/load"
UNLOAD = "/v2/repository/models/vit_high/unload"
REGION = {"key": "/a", "offset": 0, "byte_size": 64}
HTTP_SHARED_MEMORY = [
    ("POST", "/v2/systemsharedmemory/region/a/register", REGION),
    ("POST", "/v2/systemsharedmemory/region/a/unregister", {}),
    ("POST", "/v2/systemsharedmemory/unregister", {}),
    ("GET", "/v2/systemsharedmemory/status", None),
    ("GET", "/v2/cudasharedmemory/status", None),
]
HTTP_ADMIN = [
    ("POST", LOAD, {}),
    ("POST", UNLOAD, {}),
    ("POST", "/v2/repository/index", {}),
    ("GET", "/v2/trace/setting", None),
    ("POST", "/v2/trace/setting", {"trace_level": ["TENSORS"], "trace_file": "t"}),
    ("POST", "/v2/models/router/trace/setting", {"trace_level": ["TENSORS"]}),
    ("GET", "/v2/logging", None),
    ("POST", "/v2/logging", {"log_verbose_level": 1}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Pair:
    return authority(folder, "ca")


@pytest.fixture(scope="module")
def pair(folder: Path, ca: Pair) -> Pair:
    return issued(folder, ca, "server", NAMES)


@pytest.fixture(scope="module")
def person(folder: Path, ca: Pair) -> Pair:
    return issued(folder, ca, "person", "DNS:person")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Pair:
    return issued(folder, authority(folder, "other"), "stranger", NAMES)


@pytest.fixture(scope="module")
def keyed(build: Path, pair: Pair) -> Iterator[TritonServer]:
    """Models can be loaded, but the key is asked for; gRPC over TLS."""
    tls = ServingTls(pair.certificate, pair.key)
    security = Security(tls=tls, admin_key=AdminKey(KEY), allow_reload=True)
    repository = build / "model_repository"
    with running(repository, security=security) as server:
        yield server


@pytest.fixture(scope="module")
def production(build: Path, pair: Pair, ca: Pair) -> Iterator[TritonServer]:
    """Everything, clients' certificates included; gRPC on another address than HTTP."""
    tls = ServingTls(pair.certificate, pair.key, ca.certificate)
    security = Security(
        production=True,
        tls=tls,
        admin_key=AdminKey(KEY),
        http_host="127.0.0.1",
        metrics_host="127.0.0.1",
    )
    repository = build / "model_repository"
    with running(repository, host="127.0.0.2", security=security) as server:
        yield server


@contextmanager
def grpc_client(
    server: TritonServer, ca: Pair, own: Pair | None = None
) -> Iterator[triton.InferenceServerClient]:
    """As a client outside of this project connects."""
    files = {"private_key": str(own.key), "certificate_chain": str(own.certificate)} if own else {}
    with triton.InferenceServerClient(
        server.grpc_url, ssl=True, root_certificates=str(ca.certificate), **files
    ) as client:
        yield client


def http_call(server: TritonServer, method: str, path: str, body, headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def assert_restricted(call, client, headers) -> None:
    with pytest.raises(InferenceServerException, match="This protocol is restricted") as caught:
        call(client, headers)
    assert KEY not in str(caught.value)


# --- the key -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ADMIN, *SHARED_MEMORY])
def test_grpc_administration_is_refused_without_the_right_key(
    keyed: TritonServer, ca: Pair, name: str
):
    with grpc_client(keyed, ca) as client:
        for headers in wrong(GRPC):
            assert_restricted((ADMIN | SHARED_MEMORY)[name], client, headers)
        assert client.is_model_ready("vit_high")


@pytest.mark.parametrize(("method", "path", "body"), [*HTTP_ADMIN, *HTTP_SHARED_MEMORY])
def test_http_administration_is_refused_without_the_right_key(
    keyed: TritonServer, method: str, path: str, body
):
    for headers in wrong(HTTP):
        for spelled in (path, f"{path}?x=1"):
            status, answer = http_call(keyed, method, spelled, body, headers)
            assert status == 403 and "restricted" in answer, (headers, spelled)
            assert KEY not in answer
    # Other ways to write the same path lead nowhere, with the key or without.
    for spelled in (f"{path}/", path.replace("/v2/", "/v2//"), f"/.{path}", path.upper()):
        status, answer = http_call(keyed, method, spelled, body, {"admin-key": KEY})
        assert status in (400, 404), (spelled, answer)


def test_the_key_opens_the_administration_over_both_protocols(keyed: TritonServer, ca: Pair):
    region = SharedMemory(create=True, size=64)
    try:
        with grpc_client(keyed, ca) as client:
            client.unload_model("vit_high", headers=RIGHT)
            assert not client.is_model_ready("vit_high")
            client.load_model("vit_high", headers=RIGHT)
            assert client.is_model_ready("vit_high")
            client.register_system_shared_memory("a", f"/{region.name}", 64, headers=RIGHT)
            assert "a" in client.get_system_shared_memory_status(headers=RIGHT).regions
            client.unregister_system_shared_memory("a", headers=RIGHT)
            for name in ("index", "trace", "log"):
                ADMIN[name](client, RIGHT)
    finally:
        region.close()
        region.unlink()
    reading = [HTTP_ADMIN[2], HTTP_ADMIN[3], HTTP_ADMIN[6], HTTP_SHARED_MEMORY[3]]
    for method, path, body in (("POST", UNLOAD, {}), ("POST", LOAD, {}), *reading):
        status, answer = http_call(keyed, method, path, body, {"admin-key": KEY})
        assert status == 200, (path, answer)


def test_everyday_calls_ask_for_no_key(keyed: TritonServer, ca: Pair, images):
    with grpc_client(keyed, ca) as client:
        assert client.is_server_ready()
        assert client.get_model_metadata("router").name == "router"
        assert client.get_model_config("router").config.name == "router"
        assert client.get_inference_statistics("router").model_stats
        tensor = triton.InferInput("image", images[:1].shape, "FP32")
        tensor.set_data_from_numpy(images[:1])
        assert client.infer("router", [tensor]).as_numpy("embedding").shape[0] == 1
    for path in ("/v2/health/ready", "/v2/models/router", "/v2/models/router/config"):
        assert http_call(keyed, "GET", path, None, {})[0] == 200


# --- TLS ---------------------------------------------------------------------------------------


def assert_no_connection(server: TritonServer, **options: object) -> None:
    with triton.InferenceServerClient(server.grpc_url, **options) as client:
        with pytest.raises(InferenceServerException) as caught:
            client.is_server_live(client_timeout=10)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"


def test_plain_grpc_is_refused(keyed: TritonServer, production: TritonServer):
    for server in (keyed, production):
        assert_no_connection(server)


def test_the_right_authority_is_trusted_and_another_is_not(
    keyed: TritonServer, ca: Pair, folder: Path
):
    with grpc_client(keyed, ca) as client:
        assert client.is_server_live(client_timeout=10)
    other = authority(folder, "untrusted")
    assert_no_connection(keyed, ssl=True, root_certificates=str(other.certificate))
    assert_no_connection(keyed, ssl=True)  # The public authorities do not know it.


def test_mutual_tls_wants_a_certificate_of_the_clients_authority(
    production: TritonServer, ca: Pair, person: Pair, stranger: Pair
):
    with grpc_client(production, ca, person) as client:
        assert client.is_server_live(client_timeout=10)
    root = {"ssl": True, "root_certificates": str(ca.certificate)}
    assert_no_connection(production, **root)
    own = {"private_key": str(stranger.key), "certificate_chain": str(stranger.certificate)}
    assert_no_connection(production, **root, **own)


def test_our_own_calls_can_have_a_certificate_of_their_own(
    tmp_path: Path, pair: Pair, stranger: Pair, folder: Path
):
    repository = add_model(tmp_path / "repository", "echo")
    tls = ServingTls(*vars(pair).values(), folder / "other.crt", *vars(stranger).values())
    security = Security(tls=tls)
    with (
        running(repository, security=security) as server,
        server.access.open() as client,
    ):
        assert client.is_model_ready("echo")


# --- production --------------------------------------------------------------------------------


def test_no_model_is_loaded_in_production_not_even_with_the_key(
    production: TritonServer, ca: Pair, person: Pair
):
    with grpc_client(production, ca, person) as client:
        for name in ("load", "load with files", "unload"):
            assert_restricted(ADMIN[name], client, None)
            with pytest.raises(InferenceServerException, match="polling is enabled|not allowed"):
                ADMIN[name](client, RIGHT)
        assert client.is_model_ready("vit_high")
    for path in (LOAD, UNLOAD):
        assert http_call(production, "POST", path, {}, {})[0] == 403
        status, answer = http_call(production, "POST", path, {}, {"admin-key": KEY})
        assert status not in (200, 403), answer


def test_no_shared_memory_is_registered_in_production_not_even_with_the_key(
    production: TritonServer, ca: Pair, person: Pair
):
    with grpc_client(production, ca, person) as client:
        for call in SHARED_MEMORY.values():
            for headers in (*wrong(GRPC), RIGHT):
                assert_restricted(call, client, headers)
    for method, path, body in HTTP_SHARED_MEMORY:
        for headers in (*wrong(HTTP), {"admin-key": KEY}):
            assert http_call(production, method, path, body, headers)[0] == 403


def test_the_traffics_figures_want_the_key_in_production(
    production: TritonServer, ca: Pair, person: Pair
):
    with grpc_client(production, ca, person) as client:
        assert_restricted(
            lambda c, h: c.get_inference_statistics("router", headers=h), client, None
        )
        assert client.get_inference_statistics("router", headers=RIGHT).model_stats
        assert client.get_model_config("router").config.name == "router"
        ADMIN["log"](client, RIGHT)
    assert http_call(production, "GET", "/v2/models/stats", None, {})[0] == 403


def test_production_answers_its_clients(
    production: TritonServer, server: TritonServer, ca: Pair, person: Pair, images
):
    def scores(client: triton.InferenceServerClient) -> np.ndarray:
        tensor = triton.InferInput("image", images[:8].shape, "FP32")
        tensor.set_data_from_numpy(images[:8])
        return client.infer("router", [tensor]).as_numpy("score")

    with (
        grpc_client(production, ca, person) as client,
        triton.InferenceServerClient(server.grpc_url) as plain,
    ):
        np.testing.assert_allclose(scores(client), scores(plain), rtol=1e-4)


def test_each_port_listens_on_its_own_address_and_no_other_is_open(production: TritonServer):
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for connection in psutil.Process(production.pid).net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    ports = production.ports
    assert listening == {
        ("127.0.0.1", ports.http),
        ("127.0.0.2", ports.grpc),
        ("127.0.0.1", ports.metrics),
    }


def arguments_of(process_ids: list[int]) -> str:
    return "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in process_ids)


def test_no_key_is_in_our_arguments_or_in_any_log(production: TritonServer, keyed: TritonServer):
    for server in (production, keyed):
        models = [pid for pid in server.process_ids() if pid != server.pid]
        ours = arguments_of([*models, psutil.Process(server.pid).ppid(), os.getpid()])
        assert KEY not in ours
        assert KEY not in server.log_path.read_text()


def test_what_is_on_is_listed_and_what_is_not_too(production: TritonServer):
    states = {control.name: control.is_on for control in production.controls()}
    for name in ("gRPC over TLS", "client certificates", "fixed models", "restricted APIs"):
        assert states[name]
    assert states["shared memory"] and states["HTTP on loopback"]
    assert states["hidden admin key"] is ("hidepid=" in Path("/proc/mounts").read_text())
    assert not states["TLS for HTTP"]


def test_without_production_nothing_is_listed(server: TritonServer):
    assert server.controls() == []


# --- the command line --------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, pair: Pair) -> list[object]:
    key = tmp_path / "admin.key"
    key.write_text(f"{KEY}\n")
    key.chmod(0o600)
    certificate = ["--tls-cert", pair.certificate, "--tls-key", pair.key]
    return ["--production", *certificate, "--admin-key-file", key]


@pytest.mark.parametrize("more", [["--json"], []], ids=["machines", "people"])
def test_the_command_line_starts_in_production_and_says_what_it_turned_on(
    tmp_path: Path, files: list[object], more: list[str]
):
    repository = add_model(tmp_path / "repository", "echo")
    process = command("--repository", repository, "--free-ports", *more, *files)
    assert process.stdout is not None
    said = [process.stdout.readline()]
    try:
        if more:
            listed = {c["name"]: c["is_on"] for c in json.loads(said[0])["controls"]}
        else:
            while "Stop with Ctrl-C" not in said[-1]:
                said.append(process.stdout.readline())
                assert said[-1], said
            rows = [line for line in said if line[:7] in ("  on   ", "  OFF  ")]
            listed = {row[7:27].strip(): row[:7] == "  on   " for row in rows}
        assert listed["gRPC over TLS"] and not listed["TLS for HTTP"]
        assert not listed["client certificates"]
        tree = psutil.Process(process.pid).children(recursive=True)
        ours = [child.pid for child in tree if child.name() != "tritonserver"]
        assert len(ours) >= 2 and KEY not in arguments_of([process.pid, *ours])
    finally:
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert KEY not in out + error


def test_production_without_its_files_is_one_line_and_exit_code_two(
    tmp_path: Path, files: list[object]
):
    code, error = refused("--production")
    assert code == 2 and "openssl req -x509" in error
    code, error = refused(*files[:5])
    assert code == 2 and "--admin-key-file" in error
    files[-1].chmod(0o644)
    code, error = refused(*files)
    assert code == 2 and "chmod 600" in error and KEY not in error
    code, error = refused("--allow-reload", "--host", "0.0.0.0")
    assert code == 2 and "run code" in error


def test_an_open_address_without_production_is_warned_about(tmp_path: Path):
    repository = add_model(tmp_path / "repository", "echo")
    # An address for documents, which no machine has: nothing is opened for this.
    done = subprocess.run(
        [sys.executable, "-m", "server", "--repository", repository, "--host", "192.0.2.1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: 192.0.2.1 can be reached from other machines")
    assert error.startswith("error: HTTP port 8000 on 192.0.2.1 cannot be used")
    assert done.returncode == 2
