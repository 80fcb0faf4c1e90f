"""The commands under "Serve your own model" in README.md, as a newcomer would type them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from calibration.images import write_sample

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 130  # README: a certificate takes at least 113


@pytest.fixture(scope="module")
def commands():
    text = (ROOT / "README.md").read_text()
    section = text.split("## Serve your own model\n")[1].split("\n## ")[0]
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
    torch.manual_seed(0)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "path/to/your-vit")
    write_sample(folder / "path/to/images", IMAGES, seed=3)
    return folder


def start(line, folder, out=subprocess.PIPE):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, *line.split()[1:]]
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment,
        stdout=out,
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
    printed = workplace / "server.txt"
    with printed.open("w") as out:
        server = start(f"{serve} --free-ports", workplace, out)
    try:
        url = wait_for_grpc_url(server, printed)
        answer = json.loads(finish(start(f"{ask} --url {url} --json", workplace)))
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
    artifact = json.loads((workplace / "build/calibration/calibration.json").read_text())
    assert artifact["certificate"]["certified"]
    images = answer["images"]
    assert len(images) == IMAGES
    escalated = [image["score"] > artifact["threshold"] for image in images]
    assert [image["escalated"] for image in images] == escalated


def wait_for_grpc_url(server, printed):
    """The address that `python -m server` prints when it is ready."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        if match := re.search(r"grpc\D*(127\.0\.0\.1:\d+)\n", printed.read_text(), re.IGNORECASE):
            return match.group(1)
        time.sleep(0.1)
    server.terminate()
    raise AssertionError(f"no gRPC address in {printed.read_text()!r} {server.stderr.read()}")
