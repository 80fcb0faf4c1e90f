"""The command line that tritonserver is started with."""

from pathlib import Path

from server.launcher import triton_command
from server.ports import Addresses, Ports


def command(**options: object) -> list[str]:
    return triton_command(
        Path("/opt/tritonserver"),
        "triton_1_ab",
        Path("/models"),
        Path("/backends"),
        options.pop("addresses", Addresses()),
        Ports(8000, 8001, 8002),
        **options,
    )


def test_every_port_is_bound_to_loopback_unless_told():
    found = command()
    assert found[0] == "/opt/tritonserver"
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        assert f"--{name}-address=127.0.0.1" in found
        assert f"--{name}-port={port}" in found


def test_each_port_can_have_an_address_of_its_own():
    found = command(addresses=Addresses(http="127.0.0.1", grpc="0.0.0.0", metrics="10.0.0.1"))
    assert "--http-address=127.0.0.1" in found
    assert "--grpc-address=0.0.0.0" in found
    assert "--metrics-address=10.0.0.1" in found


def test_further_arguments_come_last_and_so_win():
    assert command(extra_args=["--a=1", "--b=2"])[-2:] == ["--a=1", "--b=2"]
