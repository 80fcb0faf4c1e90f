"""Wheel and sdist, built, installed and tried where nothing of the clone is."""

import hashlib
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from routing.provenance import RELEASE
from tests.unit.client_servers import grpc_server, image
from tests.unit.onnx_files import write_graph_set

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "build/dist"
NAME = f"adaptive_vit_triton-{RELEASE}"
USERS_SCRIPT = """\
from client import GrpcClient, Prediction

with GrpcClient("127.0.0.1:1") as client:
    reveal_type(client.infer([b""], timeout_s=1.0))
    client.infer([b""], threshold="high")
"""
ASK = """\
import sys, client
for kind in (client.GrpcClient, client.HttpClient):
    assert "site-packages" in kind.__init__.__code__.co_filename
with client.GrpcClient(sys.argv[1]) as asked:
    (answer,) = asked.infer([bytes([0, 0, 0, 7])], timeout_s=20.0)
print(answer.score)
"""
# As bash does after a user has typed so far and pressed the tab key.
BASH_COMPLETES = """\
eval "$(_ADAPTIVE_VIT_COMPLETE=source_bash adaptive-vit)"
COMP_WORDS=(adaptive-vit infer --protocol "") COMP_CWORD=3
"$(complete -p adaptive-vit | sed 's/.*-F \\([^ ]*\\) .*/\\1/')" adaptive-vit
printf '%s\\n' "${COMPREPLY[@]}"
"""


def run(*command, cwd, code=0, **environment):
    """A command's output, all of it; without what would lead it to the clone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def pip(site, *words, cwd):
    """This environment's pip, at work in the one beside `site`."""
    python = site / "venv/bin/python"
    return run(sys.executable, "-m", "pip", "--python", python, *words, cwd=cwd)


def build(source, out, *targets):
    run(sys.executable, "-m", "hatchling", "build", *targets, "-d", out, cwd=source)


def hashes_of_wheel(path):
    with zipfile.ZipFile(path) as wheel:
        return {name: hashlib.sha256(wheel.read(name)).hexdigest() for name in wheel.namelist()}


@pytest.fixture(scope="module")
def built():
    """Paths of the wheel and the sdist of this working tree."""
    build(ROOT, DIST)
    return DIST / f"{NAME}-py3-none-any.whl", DIST / f"{NAME}.tar.gz"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An empty folder beside an environment in which `pip install .` was run in a clone."""
    folder = tmp_path_factory.mktemp("site")
    venv.create(folder / "venv")
    pip(folder, "install", "--quiet", ".", cwd=ROOT)
    (folder / "work").mkdir()
    return folder


def tracked():
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return {line for line in listed.splitlines() if (ROOT / line).is_file()}


def test_wheel_and_sdist_hold_the_repositorys_files_and_no_others(built):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed <= tracked() | {"PKG-INFO"}
    folders = ("docs/", "tests/", "deploy/", "client/", "model_repository/")
    assert {name for name in tracked() if name.startswith(folders)} < packed
    assert {"README.md", "LICENSE", "requirements.txt", "adaptive_vit.py"} < packed
    inside = {name for name in hashes_of_wheel(wheel) if ".dist-info/" not in name}
    assert inside < packed and not any(name.startswith(("tests/", "build/")) for name in inside)


def test_the_sdist_makes_the_same_wheel(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    build(tmp_path / NAME, tmp_path / "again", "-t", "wheel")
    assert hashes_of_wheel(tmp_path / "again" / wheel.name) == hashes_of_wheel(wheel)


def test_the_installed_client_needs_nothing_else(site):
    listed = pip(site, "list", "--format", "freeze", cwd=site)
    installed = {line.partition("=")[0].lower() for line in listed.splitlines()}
    assert {"numpy", "tritonclient", "adaptive-vit-triton"} < installed
    assert not installed & {"typer", "rich", "pillow", "torch", "onnx", "scipy"}
    with grpc_server() as (_, url):
        score = run(site / "venv/bin/python", "-c", ASK, url, cwd=site / "work")
    assert float(score) == 7
    for words, extra in (((), "cli"), (("--help",), "cli"), (("calibrate", "fit"), "calibration")):
        said = run(site / "venv/bin/adaptive-vit", *words, cwd=site / "work", code=2)
        assert len(said.splitlines()) == 1, said
        assert f"pip install 'adaptive-vit-triton[{extra}]'" in said


def test_a_users_script_is_checked_against_the_installed_types(site):
    script = site / "work/script.py"
    script.write_text(USERS_SCRIPT)
    checker = (sys.executable, "-m", "mypy", "--python-executable", site / "venv/bin/python")
    said = run(*checker, "--strict", script, cwd=site / "work", code=1)
    assert 'Revealed type is "list[client.messages.Prediction]"' in said
    assert 'Argument "threshold"' in said and "Found 1 error" in said


def test_with_its_extra_the_command_line_works(site, built):
    wheel, _ = built
    pip(site, "install", "--quiet", f"{wheel}[cli]", cwd=site)
    command, work = site / "venv/bin/adaptive-vit", site / "work"
    assert "--concurrency" in run(command, "infer", "--help", cwd=work)
    assert "complete -" in run("bash", "-c", f"{command} --show-completion; true", cwd=work)
    completed = run(
        *("bash", "-c", BASH_COMPLETES),
        cwd=work,
        PATH=f"{site / 'venv/bin'}:{os.environ['PATH']}",
    )
    assert completed.split() == ["grpc", "http"]
    (work / "a.png").write_bytes(image(7))
    with grpc_server() as (_, url):
        assert "1 image" in run(command, "infer", "a.png", "--url", url, cwd=work)
    said = run(command, "serve", cwd=work, code=2)
    assert "pip install 'adaptive-vit-triton[server]'" in said and len(said.splitlines()) == 1


def test_an_installed_wheel_assembles_a_repository_from_what_lies_beside_it(built, tmp_path):
    wheel, _ = built
    place = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(place)
    write_graph_set(tmp_path / "build/onnx")
    command = (sys.executable, "-m", "adaptive_vit", "export", "repository")
    run(*command, "--live", "--max-risk", 0.1, cwd=tmp_path, PYTHONPATH=str(place))
    made = tmp_path / "build/model_repository"
    assert (made / "MANIFEST.json").is_file()
    for copied, source in (
        ("preprocess/1/imaging/decode.py", "imaging/decode.py"),
        ("router/1/routing/policy.py", "routing/policy.py"),
        ("router/1/model.py", "model_repository/router/1/model.py"),
    ):
        assert (made / copied).read_bytes() == (ROOT / source).read_bytes()


def test_an_editable_installation_is_the_clone(tmp_path):
    make = "import sys; from hatchling.build import build_editable as b; print(b(sys.argv[1]))"
    name = run(sys.executable, "-c", make, tmp_path, cwd=ROOT).split()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        (path,) = (inside for inside in wheel.namelist() if inside.endswith(".pth"))
        assert wheel.read(path).decode().split("\n")[0] == str(ROOT)
        assert not [inside for inside in wheel.namelist() if inside.startswith("client/")]
