import json
from pathlib import Path

import pytest

from perf.figures import PerfError
from perf.results_table import BEGIN, END, results_table, update_readme
from tests.unit.perf_summary import sample_summary, spread

ROOT = Path(__file__).resolve().parents[2]
ROW = (
    "| sample crops, seed 21, 200 | 5\N{NO-BREAK SPACE}%, 800 images | "
    "2 cores of Made-up CPU 3000 | dinov2-small, 112\N{NO-BREAK SPACE}px / "
    "224\N{NO-BREAK SPACE}px | 12.5 % | 95.0 % | 2.34× (bound 2.44×, efficiency 0.96) | "
    "2.23× (bound 2.38×, efficiency 0.94) | 1.03 | 1.05 | "
    "`python -m perf run --images sample --suite quick` |"
)


def folder_with(tmp_path, **summaries):
    folder = tmp_path / "results"
    folder.mkdir()
    for name, summary in summaries.items():
        (folder / f"{name}.json").write_text(json.dumps(summary))
    return folder


def test_a_summary_becomes_one_row(tmp_path):
    header, rule, row = results_table(folder_with(tmp_path, cpu=sample_summary())).splitlines()
    assert row == ROW
    columns = [name.strip() for name in header.strip("|").split("|")]
    assert columns == [
        *(
            "images",
            "risk certified",
            "device",
            "model, rungs",
            "escalated",
            "agreement",
            "speed-up, one request in flight",
        ),
        *("speed-up, saturated", "router overhead", "memory ratio", "command"),
    ]
    assert rule.count("---") == len(columns) == row.count("|") - 1


def test_devices_come_in_the_order_of_their_files(tmp_path):
    gpu = sample_summary()
    gpu["environment"]["device"] = "NVIDIA | H100"
    folder = folder_with(tmp_path, b=sample_summary(), a=gpu)
    rows = results_table(folder).splitlines()[2:]
    assert "| NVIDIA \\| H100 |" in rows[0] and rows[1] == ROW


def test_what_was_not_measured_is_a_dash_and_a_cut_off_run_says_so(tmp_path):
    summary = sample_summary() | {"complete": False, "peak_memory_ratio": None}
    del summary["speedup_saturated"], summary["answers"]
    row = results_table(folder_with(tmp_path, cpu=summary)).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == "2 cores of Made-up CPU 3000 (cut short)"
    assert [cells[i] for i in (4, 5, 7, 9)] == ["–"] * 4
    assert cells[6] == "2.34× (bound 2.44×, efficiency 0.96)" and cells[8] == "1.03"


def test_a_row_says_what_a_cascade_is_measured_beside_and_what_was_certified(tmp_path):
    summary = sample_summary() | {"images": None, "certificate": {"certified": False}}
    summary["model"] |= {"high": "px=224,int8=static", "reference": "px=224"}
    row = results_table(folder_with(tmp_path, cpu=summary)).splitlines()[2]
    cells = [cell.strip().replace("\N{NO-BREAK SPACE}", " ") for cell in row.strip("|").split("|")]
    assert cells[:2] == ["–", "–"]
    assert cells[3] == "dinov2-small, 112 px / 224 px, int8, beside 224 px"


def test_speedups_that_cannot_be_true_are_not_shown(tmp_path):
    summary = sample_summary() | {"cascade_efficiency_saturated": spread(1.2, 1.3, 1.4)}
    row = results_table(folder_with(tmp_path, cpu=summary)).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[6] == "2.34× (bound 2.44×, efficiency 0.96)"
    assert (cells[7], cells[8]) == ("not believed", "1.03")
    summary["doubts"] = {"c1": ["a reason"], "saturated": []}
    (tmp_path / "again").mkdir()
    row = results_table(folder_with(tmp_path / "again", cpu=summary)).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[6] == cells[8] == "not believed" and cells[7].startswith("2.23×")


def test_results_of_another_kind_are_passed_over(tmp_path):
    folder = folder_with(tmp_path, cpu=sample_summary(), original={"kind": "original"})
    assert results_table(folder).splitlines()[2:] == [ROW]


def test_a_folder_without_summaries_and_a_foreign_file_are_refused(tmp_path):
    folder = folder_with(tmp_path, original={"kind": "original"})
    with pytest.raises(PerfError, match="no summary"):
        results_table(folder)
    (folder / "foreign.json").write_text("{}")
    with pytest.raises(PerfError, match=r"foreign\.json: not a summary"):
        results_table(folder)


def test_the_table_replaces_what_lies_between_the_markers(tmp_path):
    folder = folder_with(tmp_path, cpu=sample_summary())
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert update_readme(readme, folder) is True
    assert readme.read_text() == (f"# Title\n\n{BEGIN}\n{results_table(folder)}\n{END}\n\nafter\n")
    assert update_readme(readme, folder) is False


@pytest.mark.parametrize(
    "text", ["", f"{BEGIN}\n", f"{END}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"]
)
def test_markers_that_are_not_there_once_each_are_asked_for(tmp_path, text):
    folder = folder_with(tmp_path, cpu=sample_summary())
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(PerfError, match="once each"):
        update_readme(readme, folder)
    assert readme.read_text() == text


def test_the_readme_shows_the_committed_results():
    table = results_table(ROOT / "perf" / "results")
    assert f"{BEGIN}\n{table}\n{END}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
