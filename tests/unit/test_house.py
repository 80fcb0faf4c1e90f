"""The rules of the house that no linter knows."""

import ast
import json
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from export.repository_command import repository_command
from routing import PROBE_ID
from server.admin_key import HOW_TO_MAKE as MAKE_A_KEY
from server.serving_tls import HOW_TO_MAKE as MAKE_TLS
from tests.tools import OPTIONAL

ROOT = Path(__file__).resolve().parents[2]
# What each folder may import of ours.
ARROWS = {
    "routing": set(),
    "imaging": set(),
    "bundle": {"routing"},
    "export": {"bundle", "client", "imaging", "report", "routing"},
    # export and server for `live`, which adds a version and rolls it out.
    "adaptation": {"bundle", "calibration", "client", "export", "imaging", "report", "routing"},
    "calibration": {"bundle", "client", "export", "imaging", "report", "routing", "server"},
    "server": {"bundle", "client", "routing"},
    "client": set(),
    "report": set(),
    "perf": {"bundle", "calibration", "client", "imaging", "report", "routing", "server"},
    "planner": {
        *(
            "adaptation",
            "bundle",
            "calibration",
            "client",
            "export",
            "imaging",
            "perf",
            "report",
            "routing",
        ),
        "server",
    },
    "demo": {"bundle", "calibration", "client", "imaging", "perf", "report", "routing", "server"},
}
# What it may start as a command besides: the demo is the commands of the README.
COMMANDS = {"demo": {"adaptation", "export", "planner"}}
OPTIONS = {"pi_heif"}  # used where it is installed
IN_TRITON = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("routing", "imaging", "model_repository", "server/backends")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(path):
    """Top-level names that a file imports absolutely."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("folder", ARROWS)
def test_arrows_point_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        ours = set(imports(path)) & {*ARROWS, "adaptive_vit"} - {folder}
        assert ours <= ARROWS[folder], f"{path} imports {ours - ARROWS[folder]}"


def commands(path):
    """Packages of ours whose verbs a file names in a row, as of `python -m export rungs`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            typed = re.match(r"([a-z]+) [a-z]+ --", node.value)
            if typed and typed[1] in ARROWS:
                yield typed[1]
        if isinstance(node, ast.List | ast.Tuple):
            words = [getattr(element, "value", None) for element in node.elts]
            words = words[words.index("-m") + 1 :] if "-m" in words else words
            verb = words[1] if len(words) > 1 and isinstance(words[1], str) else ""
            if words and words[0] in ARROWS and verb not in ARROWS and verb.islower():
                yield words[0]


@pytest.mark.parametrize("folder", ARROWS)
def test_commands_point_the_same_way(folder):
    allowed = ARROWS[folder] | COMMANDS.get(folder, set()) | {folder}
    for path in (ROOT / folder).rglob("*.py"):
        assert set(commands(path)) <= allowed, f"{path} starts {set(commands(path)) - allowed}"


def test_only_the_planner_and_the_demo_adapt():
    users = {f for f in ARROWS if "adaptation" in ARROWS[f] | COMMANDS.get(f, set())}
    assert "planner" in users <= {"planner", "demo"}
    may = {"adaptation", "planner", "demo", "adaptive_vit.py", "tests"}
    others = [path for path in ROOT.glob("*") if path.name not in {*may, "build"}]
    files = [p for o in others if o.name[:1] != "." for p in ([o] if o.is_file() else o.rglob("*"))]
    files = [path for path in files if path.suffix == ".py"]
    assert len(files) > 100
    for path in files:
        assert "adaptation" not in {*imports(path), *commands(path)}, path


def test_the_commands_are_seen():
    assert {"calibration", "export", "planner"} <= set(commands(ROOT / "demo/roads.py"))


def test_every_folder_has_its_arrows_written_down():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(ARROWS)


@pytest.mark.parametrize("folder", ["routing", "imaging"])
def test_the_cores_need_little(folder):
    allowed = {"numpy", "PIL", *OPTIONS} if folder == "imaging" else {"numpy"}
    for path in (ROOT / folder).rglob("*.py"):
        foreign = set(imports(path)) - set(sys.stdlib_module_names)
        assert foreign <= allowed, f"{path} imports {foreign}"


@pytest.mark.parametrize("path", IN_TRITON)
def test_what_runs_inside_triton_is_python_3_10(path):
    ast.parse((ROOT / path).read_text(), feature_version=(3, 10))


def test_the_image_installs_what_preprocess_and_router_import():
    needed = set()
    for model in ("preprocess", "router"):
        needed |= set(imports(ROOT / "model_repository" / model / "1/model.py"))
    needed |= {name for folder in ("routing", "imaging") for name in folder_imports(folder)}
    needed -= set(sys.stdlib_module_names) | {"triton_python_backend_utils"} | OPTIONS
    lines = (ROOT / "deploy/requirements.txt").read_text().splitlines()
    installed = {re.split("[<>=]", line)[0].lower() for line in lines if line[:1] not in ("#", "")}
    assert {{"PIL": "pillow"}.get(name, name) for name in needed} == installed
    assert "COPY deploy/requirements.txt" in (ROOT / "deploy/Dockerfile").read_text()


def folder_imports(folder):
    return {name for path in (ROOT / folder).rglob("*.py") for name in imports(path)}


def test_the_dockerfile_does_not_run_as_root():
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users and users[-1] == "triton-server"
    assert lines.index(f"USER {users[-1]}") > max(
        i for i, line in enumerate(lines) if line.startswith("RUN")
    )


def test_compose_is_read_only_on_loopback_with_enough_shared_memory():
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    triton = compose["services"]["triton"]
    assert triton["shm_size"] == "1gb"
    assert all(volume.endswith(":ro") for volume in triton["volumes"])
    assert all(port.startswith("127.0.0.1:") for port in triton["ports"])
    dockerfile = ROOT / "deploy" / triton["build"]["context"] / triton["build"]["dockerfile"]
    assert dockerfile.is_file()


def test_compose_mounts_what_is_exported_where_the_image_serves_from():
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    (volume,) = compose["services"]["triton"]["volumes"]
    mounted, place, _ = volume.split(":")
    exported = signature(repository_command).parameters["out"].default
    assert (ROOT / "deploy" / mounted).resolve() == ROOT / exported
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    (served,) = (json.loads(line[len("CMD ") :]) for line in lines if line.startswith("CMD "))
    assert served[0] == "tritonserver"
    repositories = [option for option in served if option.startswith("--model-repository")]
    assert repositories == [f"--model-repository={place}"]
    assert "command" not in compose["services"]["triton"]  # it would take the place of CMD


def test_the_containers_health_check_is_in_the_image_and_no_traffic():
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    command = compose["services"]["triton"]["healthcheck"]["test"]
    assert command == ["CMD", "python3", "/opt/adaptive-vit/healthcheck.py"]
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert "COPY deploy/healthcheck.py /opt/adaptive-vit/" in dockerfile
    assert compose["services"]["triton"]["restart"] == "unless-stopped"
    assert f'"id": "{PROBE_ID}"' in (ROOT / "deploy/healthcheck.py").read_text()


def configs():
    return {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
        for path in (ROOT / "model_repository").glob("*/config.pbtxt")
    }


def test_the_configs_in_git_are_complete_and_agree():
    models = configs()
    ensembles = {"adaptive_vit", "adaptive_tensor"}
    assert set(models) == {"preprocess", "vit_low", "vit_high", "router", *ensembles}
    # The requests of one router execute become one batch of a rung.
    assert len({model.max_batch_size for model in models.values()}) == 1
    for name in ("vit_low", "vit_high"):
        assert models[name].backend == "onnxruntime"
        assert len(models[name].instance_group) == 1
        assert models[name].HasField("dynamic_batching")
        assert "intra_op_thread_count" in models[name].parameters
    for name in ("preprocess", "router"):
        assert models[name].backend == "python" and len(models[name].instance_group) == 1


def test_every_config_names_its_versions_and_every_step_the_one_it_asks():
    models = configs()
    assert {tuple(model.version_policy.specific.versions) for model in models.values()} == {(1,)}
    for ensemble, steps in {
        "adaptive_vit": ["preprocess", "router"],
        "adaptive_tensor": ["router"],
    }.items():
        found = models[ensemble].ensemble_scheduling.step
        assert [(step.model_name, step.model_version) for step in found] == [(s, 1) for s in steps]
    assert models["adaptive_vit"].output == models["adaptive_tensor"].output


def test_every_committed_test_is_run_nowhere_skipped():
    words = re.compile(r"pytest\.skip|mark\.skip|mark\.xfail|importorskip")
    skipping = [path for path in (ROOT / "tests").rglob("*.py") if words.search(path.read_text())]
    # A browser or a JDK may be missing, and beside a C++ backend those of the stand-in have nothing
    # to look at: they are skipped, which pytest tells.
    assert sorted(path.name for path in skipping) == ["servers.py", "test_house.py", "tools.py"]
    assert set(OPTIONAL) == {"chromedriver", "chromium", "java"}


def secrets_in(text):
    """Names of key and certificate files in what people are told to type."""
    redirected = re.findall(r"openssl [^\n>]*> *([\w.-]+)", text)
    return {*redirected, *re.findall(r"[\w.-]+\.(?:key|crt|cer|csr|pem|p12|pfx|srl)\b", text)}


def test_keys_and_certificates_that_people_are_told_to_make_stay_out_of_git_and_images():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    told = {page.name: secrets_in(page.read_text()) for page in pages}
    told["hints"] = secrets_in(f"{MAKE_A_KEY} {MAKE_TLS}")
    assert told["operations.md"] >= {"admin.key", "tls.crt", "tls.key"} <= told["hints"]
    assert "clients.crt" in told["SECURITY.md"]
    names = sorted({name for found in told.values() for name in found})
    places = [f"{folder}{name}" for folder in ("", "deploy/") for name in names]
    check = ["git", "check-ignore", "--no-index", *places]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == places
    everything, *excepted = (ROOT / ".dockerignore").read_text().split()
    assert everything == "**"
    assert excepted == ["!deploy/requirements.txt", "!deploy/healthcheck.py"]
