"""Connections: reused, encrypted, with the key of restricted APIs."""

import asyncio
import gc
import json
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

import client.__main__ as command_line
from client import (
    AccessDeniedError,
    AsyncGrpcClient,
    DeadlineError,
    GrpcClient,
    HttpClient,
    InvalidRequestError,
    Tls,
    UnavailableError,
)
from client.grpc_clients import CHANNEL_ARGUMENTS
from tests.unit.certificate_files import authority, issued, openssl
from tests.unit.client_servers import (
    both,
    every,
    grpc_server,
    http_server,
    image,
    listening,
    served,
)


def score(kind, url, **options):
    with kind(url, **options) as client:
        return client.infer([image(7)], timeout_s=20)[0].score


# --- one connection ----------------------------------------------------------------------------


@both
def test_a_grpc_client_has_one_connection_for_all_threads_and_their_event_loops(kind):
    with served(kind) as (asked, url), kind(url) as client, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: client.infer([image(number)]), range(20)))
    assert [answer.score for (answer,) in found] == [*range(20)]
    assert len(asked) == 20 and len({request.peer for request in asked}) == 1


@pytest.mark.filterwarnings("error")
def test_an_asyncio_client_is_made_used_and_closed_in_whatever_loop_there_is():
    async def answers(client, *numbers):
        found = [await client.infer([image(number)], timeout_s=20) for number in numbers]
        return [answer.score for (answer,) in found]

    async def streamed(client, *numbers):
        return [answer.score async for answer in client.stream(map(image, numbers))]

    with grpc_server() as (service, url):
        client = AsyncGrpcClient(url)  # where no loop runs
        assert asyncio.run(answers(client, 1, 2)) == [1, 2]
        assert asyncio.run(streamed(client, 3, 4)) == [3, 4]  # in another one
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(asyncio.run, answers(client, 5)).result() == [5]
        assert len({request.peer for request in service.asked}) == 1
        asyncio.run(client.close())
        with pytest.raises(InvalidRequestError, match="this client is closed"):
            asyncio.run(answers(client, 6))
        AsyncGrpcClient(url)  # used by nobody, closed by nobody
        gc.collect()


@every
def test_two_clients_have_connections_of_their_own_and_keep_them(kind):
    # gRPC would share them, across a fork too: what closes one would end the other's requests.
    with served(kind) as (asked, url), kind(url) as one, kind(url) as other:
        for client in (one, other, one):
            client.infer([image(1)])
    first, second, third = (request.peer for request in asked)
    assert first == third != second


def test_keep_alive_stays_within_what_triton_permits_by_default():
    arguments = dict(CHANNEL_ARGUMENTS)
    assert arguments["grpc.keepalive_time_ms"] > 300_000  # else GOAWAY, too_many_pings
    assert arguments["grpc.keepalive_permit_without_calls"] == 0


@every
def test_an_admin_key_goes_with_every_request(kind):
    header = "admin-key" if kind is HttpClient else "triton-grpc-protocol-admin-key"
    with served(kind) as (asked, url):
        assert score(kind, url, admin_key="secret") == score(kind, url) == 7
        if kind is GrpcClient:
            with kind(url, admin_key="secret") as client:
                client.server_version()
            assert asked.pop().headers[header] == "secret"
    assert [request.headers.get(header) for request in asked] == ["secret", None]


# --- TLS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder where `ours` signed `server` and `client`, and `others` signed `stranger`."""
    folder = tmp_path_factory.mktemp("certificates")
    for signs, names in (("ours", ("server", "client")), ("others", ("stranger",))):
        signer = authority(folder, signs)
        for name in names:
            issued(folder, signer, name, "IP:127.0.0.1")
    # OpenSSL would ask for its passphrase on the terminal.
    locked = ("-out", folder / "locked.key", "-aes128", "-passout", "pass:secret")
    openssl("ec", "-in", folder / "client.key", *locked)
    return folder


def tls_of(folder, ca="ours", client=None):
    pair = (folder / f"{client}.crt", folder / f"{client}.key") if client else ()
    return Tls(ca and folder / f"{ca}.crt", *pair)


def grpc_over_tls(certificates, mutual):
    pair = ((certificates / name).read_bytes() for name in ("server.key", "server.crt"))
    roots = (certificates / "ours.crt").read_bytes() if mutual else None
    return grpc_server(credentials=grpc.ssl_server_credentials([tuple(pair)], roots, mutual))


def http_over_tls(certificates, mutual):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    if mutual:
        context.load_verify_locations(certificates / "ours.crt")
        context.verify_mode = ssl.CERT_REQUIRED
    return http_server(context=context)


@contextmanager
def serve(kind, certificates, mutual=False):
    over_tls = http_over_tls if kind is HttpClient else grpc_over_tls
    with over_tls(certificates, mutual) as (found, url):
        yield getattr(found, "asked", found), url


@every
def test_a_server_that_our_authority_signed_is_trusted_and_shown_our_certificate(
    kind, certificates
):
    with serve(kind, certificates) as (_, url):
        assert score(kind, url, tls=tls_of(certificates)) == 7
    with serve(kind, certificates, mutual=True) as (_, url):
        assert score(kind, url, tls=tls_of(certificates, client="client")) == 7


@every
def test_a_client_without_tls_asks_no_server_that_has_it(kind, certificates):
    with serve(kind, certificates) as (asked, url):
        with pytest.raises(UnavailableError, match=f"server at {url} wants TLS; give the cert"):
            score(kind, url)
    assert not asked


@every
def test_a_client_with_tls_asks_no_plain_server(kind, certificates):
    with served(kind) as (asked, url):
        with pytest.raises(AccessDeniedError, match="wrong version number"):
            score(kind, url, tls=tls_of(certificates), admin_key="secret")
    assert not asked


def test_the_command_line_takes_certificates_and_a_key_from_files(
    certificates, tmp_path, monkeypatch, capsys
):
    (tmp_path / "a.png").write_bytes(image(7))
    (tmp_path / "key").write_text("secret\n")
    away = (grpc.StatusCode.UNAVAILABLE, "away")
    with grpc_over_tls(certificates, mutual=True) as (service, url):
        service.answer = lambda number, *_: away if number == 3 else None  # the first image
        arguments = [
            *("infer", tmp_path / "a.png", "--url", url, "--json", "--timeout-s", 9),
            *("--tls-ca", certificates / "ours.crt", "--tls-cert", certificates / "client.crt"),
            *("--tls-key", certificates / "client.key", "--admin-key-file", tmp_path / "key"),
        ]
        for retries, code in ((1, 0), (0, 1)):
            service.asked.clear()
            monkeypatch.setattr(
                sys, "argv", ["client", *map(str, arguments), "--retries", str(retries)]
            )
            with pytest.raises(SystemExit) as left:
                command_line.main()
            assert (left.value.code or 0) == code
            report = json.loads(capsys.readouterr().out)
            assert report["summary"]["errors"] == code
            assert len(service.asked) == 3 + retries
            headers = [asked.headers["triton-grpc-protocol-admin-key"] for asked in service.asked]
            assert set(headers) == {"secret"}
            assert service.asked[2].parameters["timeout"] <= 9_000_000


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_server_that_does_not_read_its_request_is_waited_for_until_the_deadline(
    encrypted, certificates
):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    peers = []

    def accept():
        peer, _ = listener.accept()
        peers.append(context.wrap_socket(peer, server_side=True) if encrypted else peer)

    with listening() as (listener, url):
        accepting = threading.Thread(target=accept)
        accepting.start()
        tls = tls_of(certificates)
        with HttpClient(url, tls=tls if encrypted else None) as client:
            started = time.monotonic()
            with pytest.raises(DeadlineError, match=r"within 0\.5 s"):
                client.infer([bytes(1 << 25)], timeout_s=0.5)
            assert 0.4 < time.monotonic() - started < 2
        accepting.join()
        peers[0].close()


@every
@pytest.mark.parametrize(
    ("ca", "cert", "key", "said"),
    [
        (None, "client.crt", None, "a client cert without a key"),
        (None, None, "client.key", "a client key without a cert"),
        ("none.crt", None, None, r"cannot read .*none.crt for TLS: No such file"),
        ("ours.key", None, None, r"ours.key holds no certificate in PEM format"),
        ("ours.crt", "client.crt", "none.key", r"cannot read .*none.key for TLS: No such file"),
        ("ours.crt", "client.crt", "server.key", r"a passphrase \(key values mismatch\)"),
        ("ours.crt", "client.csr", "client.key", r"client.csr and .* in PEM format"),
        ("ours.crt", "client.crt", "locked.key", r"locked.key must be .* without a passphrase"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_connecting(
    kind, ca, cert, key, said, certificates
):
    files = (None if name is None else certificates / name for name in (ca, cert, key))
    with pytest.raises(InvalidRequestError, match=said) as caught:
        kind("127.0.0.1:1", tls=Tls(*files))
    assert "\n" not in str(caught.value)
