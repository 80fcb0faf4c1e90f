"""What the fault tests share: known answers, and a table of results at the end."""

from __future__ import annotations

import logging

import pytest

from tests.commands import said
from tests.faults import results
from tests.faults.processes import ROOT
from tests.faults.truth import work_out
from tests.triton.conftest import build, crops, graph_set  # noqa: F401

RESULTS = ROOT / "build/faults/results.json"
_ROWS = pytest.StashKey[list]()
_FIGURES = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[_ROWS] = []
    config.stash[_FIGURES] = {}


@pytest.fixture(scope="session")
def truth(build, graph_set, crops):  # noqa: F811
    return work_out(graph_set, build / "calibration.json", crops)


@pytest.fixture(scope="session")
def assembled(build, tmp_path_factory):  # noqa: F811
    """Assemble a repository as a user would: `assembled("--on-high-failure", "low")`."""
    folder = tmp_path_factory.mktemp("repositories")

    def make(*options):
        out = folder / "_".join([*map(str, options), "repository"]).replace("/", "_")
        if not out.exists():
            # Nothing but the load reaches a rung.
            said(
                *("export", "repository", "--onnx", build / "onnx", "--out", out),
                *("--calibration", build / "calibration.json", "--reference-check", "off"),
                *options,
            )
        return out

    return make


@pytest.fixture(scope="session")
def record(request):
    """Add a row to the table: `record(row)`, or a figure: `record(name, value)`."""

    def add(what, value=None):
        if isinstance(what, results.Row):
            request.config.stash[_ROWS].append(what)
        else:
            request.config.stash[_FIGURES][what] = value
        logging.getLogger("faults").info("%s %s", what, "" if value is None else value)

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows, figures = config.stash[_ROWS], config.stash[_FIGURES]
    if not rows and not figures:
        return
    results.write(rows, figures, RESULTS)
    terminalreporter.section("faults")
    if rows:
        terminalreporter.write_line(results.table(rows))
    for name, value in figures.items():
        terminalreporter.write_line(f"{name}: {value}")
    terminalreporter.write_line(f"wrote {RESULTS.relative_to(ROOT)}")
