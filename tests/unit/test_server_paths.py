"""Paths as a shell, a list of paths and every locale read them."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from server import ServerUsageError
from server.paths import check_names, is_plain, plain
from server.repository import check_repository
from tests.servers import ECHO_CONFIG

ODD = [
    *("a b", "it's", 'q"q', "$HOME", "a;b", "`touch x`", "$(touch x)", "new\nline", "ünï", "a*b"),
    *("a:b", "~t", "#c", "a&b", "a\\b", "{a,b}", "a!b", "[a]", "<a>", "a|b", "tab\t", "-a (b)"),
    os.fsdecode(b"\xff\xfe"),
]


@pytest.mark.parametrize("name", ODD)
def test_a_path_that_can_be_misread_is_handed_on_by_a_link(tmp_path: Path, name: str):
    folder, links = tmp_path / name, tmp_path / "links"
    folder.mkdir()
    links.mkdir()
    (folder / "file").write_text("reached")
    link = plain(folder, links, "repository")
    assert link == links / "repository" == plain(folder, links, "repository")
    assert (link / "file").read_text() == "reached"


@pytest.mark.parametrize("name", ["plain", "-dash", "100%", "v1.2_x", "a=b,c@d+e"])
def test_what_is_plain_is_left_as_it_is_and_a_shell_leaves_it_too(tmp_path: Path, name: str):
    path = tmp_path / name
    assert plain(path, tmp_path, "link") == path and not (tmp_path / "link").is_symlink()
    read = subprocess.check_output(["bash", "-c", f"printf %s {path}"], text=True)
    assert read == str(path)


def test_a_long_path_is_handed_on_by_a_link_until_nothing_below_it_can_be_reached(tmp_path: Path):
    long, too_long = Path("/" + "x/" * 600), Path("/" + "x/" * 2000)
    assert plain(long, tmp_path, "link") == tmp_path / "link"
    with pytest.raises(ServerUsageError, match=r"has 4\d{3} bytes.*such as a link"):
        plain(too_long, tmp_path, "other")


PARAMETER = 'parameters { key: "EXECUTION_ENV" value { string_value: "%s" } }\n'
INSIDE = PARAMETER % "$$TRITON_MODEL_DIRECTORY/environment.tar.gz"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("echo", ECHO_CONFIG + INSIDE, ""),
        ("echo", "not one at all {", ""),  # Triton's to say.
        ("echo;id", ECHO_CONFIG, "the model 'echo;id' in .* rename its folder"),
        ("echo", ECHO_CONFIG + PARAMETER % "/env/$(id)", r"config.pbtxt of echo .*\$\(id\)"),
        ("echo", ECHO_CONFIG + 'default_model_filename: "a b.py"', "config.pbtxt of echo .*a b"),
    ],
)
def test_a_model_that_a_shell_would_misread_is_refused(
    tmp_path: Path, name: str, config: str, message: str
):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.pbtxt").write_text(config)
    if not message:
        check_names(tmp_path, [name])
        return
    with pytest.raises(ServerUsageError) as caught:
        check_names(tmp_path, [name])
    assert re.search(message, str(caught.value))


def test_models_that_need_not_be_ready_are_looked_at_too(tmp_path: Path):
    for name in ("echo", "$(id)"):  # Triton loads every folder
        (tmp_path / name).mkdir()
    with pytest.raises(ServerUsageError, match="rename its folder"):
        check_repository(tmp_path, ["echo"])


def test_only_paths_of_plain_signs_are_plain():
    assert not any(is_plain(f"/{name}") for name in ODD) and not is_plain("")
