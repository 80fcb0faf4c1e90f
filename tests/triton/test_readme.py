"""The commands under "Serve your own model" in README.md, as a newcomer would type them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTModel

from calibration.sample import write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def commands():
    section = (ROOT / "README.md").read_text().split("## Serve your own model")[1]
    blocks = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the user's own headless ViT and images."""
    folder = tmp_path_factory.mktemp("user")
    config = ViTConfig(
        image_size=224,
        patch_size=16,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "path/to/your-vit")
    write(folder / "path/to/images", 60, seed=3)
    return folder


def start(line, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, *line.split()[1:]]
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, out + error
    return out


def test_the_five_commands_and_the_client(commands, workplace):
    modules = [line.split()[2:4] for line in commands]
    assert modules == [
        ["export", "rungs"],
        ["calibration", "collect"],
        ["calibration", "fit"],
        ["export", "repository"],
        ["server", "--repository"],
        ["client", "infer"],
    ]
    *prepare, serve, ask = commands
    for line in prepare:
        finish(start(line, workplace))
    server = start(f"{serve} --free-ports", workplace)
    try:
        url = wait_for_grpc_url(server)
        answer = json.loads(finish(start(f"{ask} --url {url} --json", workplace)))
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
    assert len(answer["images"]) == 60
    escalated = [image["escalated"] for image in answer["images"]]
    assert 0 < sum(escalated) < 60


def wait_for_grpc_url(server):
    """The address that `python -m server` prints when it is ready."""
    deadline = time.monotonic() + 120
    printed = ""
    while time.monotonic() < deadline and server.poll() is None:
        printed += server.stdout.readline()
        if match := re.search(r"grpc\D*(127\.0\.0\.1:\d+)", printed, re.IGNORECASE):
            return match.group(1)
    raise AssertionError(f"no gRPC address in {printed!r} {server.stderr.read()}")
