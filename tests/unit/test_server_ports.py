"""Ports asked for, and ports picked."""

import socket
from collections.abc import Iterator

import pytest

from server import ServerUsageError
from server.ports import (
    Addresses,
    Ports,
    check_ports,
    is_wildcard,
    pick_free_ports,
    public_url,
    url,
)

HOST = "127.0.0.1"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_picked_ports_pass_the_check():
    check_ports(Addresses(), pick_free_ports(HOST))


def test_picked_ports_differ(monkeypatch: pytest.MonkeyPatch):
    low, *others = sorted(pick_free_ports(HOST).all)
    drawn = iter([low, low, low, *others])
    monkeypatch.setattr("random.randint", lambda lowest, highest: next(drawn))
    assert sorted(pick_free_ports(HOST).all) == [low, *others]


@pytest.mark.parametrize(
    ("index", "name", "flag"),
    [(0, "HTTP", "--http-port"), (1, "gRPC", "--grpc-port"), (2, "metrics", "--metrics-port")],
)
def test_a_port_in_use_is_named(taken: int, index: int, name: str, flag: str):
    ports = list(pick_free_ports(HOST).all)
    ports[index] = taken
    with pytest.raises(ServerUsageError) as caught:
        check_ports(Addresses(), Ports(*ports))
    message = str(caught.value)
    assert f"{name} port {taken} on {HOST}" in message
    assert flag in message
    assert "in use" in message
    assert "\n" not in message


def test_a_recently_closed_connection_is_no_obstacle():
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        client = socket.create_connection((HOST, port))
        server, _ = listener.accept()
        server.close()  # The side that closes first keeps the port in TIME_WAIT.
        client.close()
    free = pick_free_ports(HOST)
    check_ports(Addresses(), Ports(port, free.grpc, free.metrics))


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_an_impossible_port_is_refused(port: int):
    with pytest.raises(ServerUsageError, match="not between 1 and 65535"):
        check_ports(Addresses(), Ports(http=port))


def test_equal_ports_are_refused():
    with pytest.raises(ServerUsageError, match="must differ: HTTP 9000, gRPC 9000"):
        check_ports(Addresses(), Ports(9000, 9000, 9001))


def test_an_address_of_somebody_else_is_refused():
    with pytest.raises(ServerUsageError, match=r"no free port on 192\.0\.2\.1"):
        pick_free_ports("192.0.2.1")  # TEST-NET-1, never a local address.


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "0:0:0:0:0:0:0:0"])
def test_a_wildcard_address_is_told_as_one_to_call(address: str):
    here, elsewhere = url(address, 8001), public_url(address, 8001)
    assert here == ("[::1]:8001" if ":" in address else "127.0.0.1:8001")
    host, _, port = elsewhere.rpartition(":")
    assert port == "8001" and not is_wildcard(host.strip("[]"))
    # It is this machine's: what binds it is called there.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((host.strip("[]"), 0))


def test_where_no_way_leads_out_loopback_is_told(monkeypatch: pytest.MonkeyPatch):
    def no_way(*_: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", no_way)
    assert public_url("0.0.0.0", 8001) == "127.0.0.1:8001"
    assert public_url("::", 8001) == "[::1]:8001"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.1", "vit.example"])
def test_any_other_address_is_told_as_it_is(address: str):
    assert public_url(address, 8001) == url(address, 8001)
