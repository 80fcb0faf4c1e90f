"""Which connections go through a proxy of the environment, with one that keeps what it is asked."""

import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import grpc
import pytest

from calibration.served import ServedError, ServedRungs
from client import ClientError, GrpcClient, HttpClient, InvalidRequestError, Tls, UnavailableError
from client.proxies import Proxy, grpc_options, is_here, proxy_of
from demo.live import _served_figures
from demo.page import served_labels
from perf.analyzer_install import Analyzer
from perf.target import Target
from server import access
from server.access import Access
from server.errors import ServerUsageError
from server.security import Security
from tests.unit.certificate_files import authority, issued
from tests.unit.client_servers import (
    both,
    every,
    grpc_server,
    http_server,
    image,
)

NAMES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy", "no_proxy", "no_grpc_proxy")
NAME = "triton.example"


@contextmanager
def proxy(url, says=b"HTTP/1.1 200 connected\r\n\r\n"):
    """A proxy that passes everything on to this HOST:PORT: its address, and the heads it was sent.

    Args:
        url: whatever the proxy is asked for, this is what answers.
        says: its answer to CONNECT.
    """
    heads, host, port = [], *url.split(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(near):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = near.recv(1)
            if not piece:
                return
            head += piece
        heads.append(head.decode())
        with near, socket.create_connection((host, port)) as far:
            if head.startswith(b"CONNECT"):
                near.sendall(says)
            else:  # As proxies do, the name of the server is taken out of the first line.
                method, target, version = head.partition(b"\r\n")[0].split(b" ")
                path = b"/" + target.split(b"/", 3)[3]
                far.sendall(head.replace(b" ".join((method, target)), method + b" " + path, 1))
            back = threading.Thread(target=pass_on, args=(far, near))
            back.start()
            pass_on(near, far)
            back.join()

    def accept():
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", heads
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def pass_on(source, target):
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of proxies: those named, and no others."""

    def be(**variables):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    be()
    return be


def everywhere(address):
    """Every variable that could name a proxy."""
    named = {name: f"http://{address}" for name in NAMES if not name.startswith("no_")}
    return {**named, **{name.upper(): value for name, value in named.items()}}


@contextmanager
def served(kind):
    with (http_server if kind is HttpClient else grpc_server)() as (asked, url):
        yield getattr(asked, "asked", asked), url


def score(kind, url, **options):
    with kind(url, **options) as client:
        return client.infer([image(7)], timeout_s=20)[0].score


@every
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "0.0.0.0"])
def test_nothing_on_this_machine_is_asked_through_a_proxy(kind, host, environment):
    with served(kind) as (_, url), proxy(url) as (address, heads):
        environment(**everywhere(address))
        assert score(kind, url.replace("127.0.0.1", host)) == 7
        assert heads == []


@every
def test_another_machine_is_asked_through_it(kind, environment):
    with served(kind) as (asked, url), proxy(url) as (address, heads):
        environment(**everywhere(f"me:p%40ss@{address}"))
        there = f"{NAME}:8000"
        assert score(kind, there) == 7
        first, *headers = heads[0].split("\r\n")
        target = f"CONNECT {there}"
        if kind is HttpClient:
            target = f"POST http://{there}/v2/models/adaptive_vit/infer"
            assert asked[0].headers["Host"] == there
        assert first == f"{target} HTTP/1.1"
        assert "proxy-authorization: basic bwu6cebzcw==" in [line.lower() for line in headers]


def test_https_goes_through_a_tunnel(tmp_path, environment):
    signer = authority(tmp_path, "signer")
    pair = issued(tmp_path, signer, "server", f"DNS:{NAME}")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.certificate, pair.key)
    with http_server(context=context) as (_, url), proxy(url) as (address, heads):
        environment(HTTPS_PROXY=f"http://me:x@{address}", http_proxy="http://127.0.0.1:9")
        assert score(HttpClient, f"{NAME}:8443", tls=Tls(signer.certificate)) == 7
        assert heads[0].startswith(f"CONNECT {NAME}:8443 HTTP/1.1\r\nHost: {NAME}:8443\r\n")
        assert "Proxy-Authorization: Basic bWU6eA==" in heads[0]


def test_grpc_takes_from_curls_variables_what_its_own_do_not_say(tmp_path, environment):
    signer = authority(tmp_path, "signer")
    pair = issued(tmp_path, signer, "server", f"DNS:{NAME}")
    credentials = grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.certificate.read_bytes())]
    )
    with grpc_server(credentials=credentials) as (_, url), proxy(url) as (address, heads):
        for variable in ("HTTPS_PROXY", "ALL_PROXY"):
            heads.clear()
            environment(**{variable: f"http://{address}"})
            assert score(GrpcClient, f"{NAME}:8001", tls=Tls(signer.certificate)) == 7
            assert heads[0].startswith(f"CONNECT {NAME}:8001 HTTP/1.1")


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy", "ALL_PROXY"])
def test_grpc_finds_a_proxy_whose_address_has_no_scheme(variable, environment):
    with grpc_server() as (_, url), proxy(url) as (address, heads):
        environment(**{variable: address})
        assert score(GrpcClient, f"{NAME}:8001") == 7
        assert heads[0].startswith(f"CONNECT {NAME}:8001 HTTP/1.1")


@both
def test_a_proxy_that_nobody_answers_at_is_an_error_of_a_client(kind, environment):
    environment(http_proxy="http://127.0.0.1:9")
    with pytest.raises(UnavailableError):
        score(kind, f"{NAME}:8000", retry=None)


def test_a_proxy_that_refuses_says_so(environment):
    with http_server() as (_, url), proxy(url, b"HTTP/1.1 403 Forbidden\r\n\r\n") as (address, _):
        environment(https_proxy=f"http://{address}")
        with pytest.raises(Exception, match=rf"proxy {address} refuses {NAME}:8443: Forbidden"):
            score(HttpClient, f"{NAME}:8443", tls=Tls())


@pytest.mark.parametrize(
    ("variables", "url", "scheme", "port"),
    [
        ({"http_proxy": "p:1"}, "a.example:80", "http", 1),
        ({"http_proxy": "http://p:1/"}, "[2001:db8::1]:80", "http", 1),
        ({"http_proxy": "p"}, "a.example:80", "http", 1080),
        ({"HTTP_PROXY": "p:1"}, "a.example:80", "http", None),  # As curl has it.
        ({"http_proxy": "p:1"}, "a.example:80", "https", None),
        ({"HTTPS_PROXY": "p:1", "https_proxy": "p:2"}, "a.example:80", "https", 2),
        ({"HTTPS_PROXY": "p:1"}, "a.example:80", "https", 1),
        ({"ALL_PROXY": "p:1"}, "a.example:80", "http", 1),
        ({"http_proxy": "", "all_proxy": "p:2"}, "a.example:80", "http", 2),
        *(
            ({"http_proxy": "p:1", name: exempt}, url, "http", port)
            for name in ("no_proxy", "NO_PROXY")
            for exempt, url, port in [
                ("*", "a.example:80", None),
                ("b.org, .EXAMPLE", "A.example:80", None),
                ("example", "a.example:80", None),
                ("a.example", "a.example.:80", None),
                ("xample", "a.example:80", 1),
                (",. ", "a.example:80", 1),
                ("192.0.2.0/24", "192.0.2.7:80", None),
                ("192.0.2.0/24", "192.0.3.7:80", 1),
                ("192.0.2.7", "192.0.2.7:80", None),
                ("[2001:db8::1]", "[2001:db8::1]:80", None),
                ("2001:db8::/32", "[2001:DB8::2]:80", None),
                ("192.0.2.0/99", "192.0.2.7:80", 1),
            ]
        ),
    ],
)
def test_the_environment_is_read_as_curl_reads_it(variables, url, scheme, port, environment):
    environment(**variables)
    found = proxy_of(url, scheme)
    assert found == (None if port is None else Proxy("p", port))
    assert proxy_of("127.0.0.1:80", scheme) is None
    if port is None and any(name.lower() == "no_proxy" for name in variables):
        assert grpc_options(url) == [("grpc.enable_http_proxy", 0)]


@every
@pytest.mark.parametrize(
    "value", ["socks5h://127.0.0.1:1", "https://p:1", "http://p:port", "http://", "http://[::1"]
)
def test_a_proxy_of_another_kind_is_refused_with_the_way_out(value, kind, environment):
    environment(all_proxy=value)
    with pytest.raises(InvalidRequestError, match=f"all_proxy .*put {NAME} into no_proxy"):
        kind(f"{NAME}:8000")
    kind("localhost:8000").close()


def test_commands_refuse_it_as_bad_usage(environment):
    environment(ALL_PROXY="socks5h://127.0.0.1:1")
    with pytest.raises(ServerUsageError, match="ALL_PROXY names a proxy"):
        Access(f"{NAME}:8001").open()
    with pytest.raises(ServedError, match="ALL_PROXY names a proxy"):
        ServedRungs(f"{NAME}:8001", SimpleNamespace(classes=None))


def test_grpcs_own_variables_go_before_the_others(environment):
    environment(grpc_proxy="p:1", http_proxy="socks5h://p:2")
    assert grpc_options(f"{NAME}:8001") == [("grpc.http_proxy", "http://p:1")]
    environment(https_proxy="socks5h://p:2", no_grpc_proxy=NAME)
    assert grpc_options(f"{NAME}:8001") == [("grpc.enable_http_proxy", 0)]


@pytest.mark.parametrize(
    ("url", "here"),
    [
        *(
            (host, True)
            for host in ("127.0.0.1:1", "127.8.9.1:1", "[::1]:1", "0.0.0.0:1", "[::]:1")
        ),
        *((host, True) for host in ("LocalHost:1", "x.localhost:1", "[::ffff:127.0.0.1]:1", "::1")),
        *((host, False) for host in ("128.0.0.1:1", "localhost.example:1", "[fe80::1%lo]:1", "")),
    ],
)
def test_what_this_machine_is(url, here):
    assert is_here(url) is here


# --- what we start -----------------------------------------------------------------------------


def test_the_server_that_we_started_is_asked_directly_whatever_it_binds(environment, monkeypatch):
    environment(**everywhere("127.0.0.1:9"))
    opened = []
    monkeypatch.setattr(access, "_Client", lambda url, **options: opened.append(options))
    Security().access("192.0.2.1:8001").open()
    Access("127.0.0.1:8001").open()
    Access("192.0.2.1:8001").open()
    directly = [("grpc.enable_http_proxy", 0) in options["channel_args"] for options in opened]
    assert directly == [True, True, False]


@pytest.mark.parametrize(
    "ask",
    [
        lambda url: Target(url, None, None),
        lambda url: ServedRungs(url, SimpleNamespace(classes=None)),
    ],
)
def test_measuring_and_collecting_ask_a_server_on_this_machine_directly(ask, environment):
    with grpc_server() as (service, url), proxy(url) as (address, heads):
        environment(**everywhere(address))
        with suppress(ClientError, AttributeError):  # It has none of the models.
            ask(url)
        assert service.asked and heads == []


def test_the_demo_reads_its_servers_metrics_directly(environment):
    with http_server() as (_, url):
        environment(**everywhere("127.0.0.1:9"))
        assert _served_figures(f"http://{url}/metrics")["requests"] == 0


def failing(*_):
    return grpc.StatusCode.INTERNAL, "it names no classes"


def test_the_page_asks_its_server_as_clients_do(environment):
    with grpc_server(failing) as (service, url), proxy(url) as (address, heads):
        environment(**everywhere(address))
        here = SimpleNamespace(url=url.replace("127.0.0.1", "0.0.0.0"), model="adaptive_vit")
        assert served_labels(here, 3) == () and len(service.asked) == 1 and heads == []
        environment(ALL_PROXY=address)
        there = SimpleNamespace(url=f"{NAME}:8001", model="adaptive_vit")
        assert served_labels(there, 3) == () and len(service.asked) == 2 and len(heads) == 1


def test_perf_analyzer_is_told_of_no_proxy_to_this_machine(environment, tmp_path):
    variables = {**everywhere("127.0.0.1:9"), "no_proxy": "b.org"}
    environment(**variables)
    analyzer = Analyzer(tmp_path)
    assert not variables.keys() & analyzer.environment("localhost:8001").keys()
    assert variables.items() <= analyzer.environment(f"{NAME}:8001").items()
