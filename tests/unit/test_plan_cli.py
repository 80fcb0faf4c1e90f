"""`python -m planner plan`, its workshop stood in for: what it prints, writes and refuses."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from export.request import Texts
from planner.__main__ import _chosen, main
from tests import commands
from tests.unit.image_files import write_images
from tests.unit.pages import Page
from tests.unit.plan_content import plan_content, varied
from tests.unit.plan_workplace import FakeWorkshop, TwoColours, make_request

pytestmark = pytest.mark.usefixtures("remembered_fits")

PLAN = ("plan", "--model", "tiny", "--px", 8, "--candidates", "px=4,int8=static,align; px=4")
RISK = ("--max-risk", 0.2)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command line in a fresh folder; returns exit code, stdout and stderr."""
    source = TwoColours(700)
    for folder in ("images", "empty"):
        (tmp_path / folder).mkdir()
    for index in range(len(source)):
        (tmp_path / "images" / source.names[index]).write_bytes(source[index].data)
    workshop = FakeWorkshop()
    monkeypatch.setattr("planner.__main__.Workshop", lambda: workshop)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["planner", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    run.workshop = workshop
    return run


def test_a_plan_is_printed_and_written_with_its_page_and_its_rungs(run, tmp_path):
    code, out, err = run(*PLAN, "--images", "images", *RISK, "--require-certificate")
    assert code == 0, err
    content = json.loads((tmp_path / "build/plan/plan.json").read_text())
    words = " ".join(out.split())
    assert " ".join(content["chosen"]["certificate"]["statement"].split()) in words
    assert "wrote build/plan/plan.json and build/plan/plan.html" in words
    lines = out.splitlines()  # 80 columns wide, as where nothing is a terminal
    for letter, entry in zip("ABCD", content["tested"], strict=False):
        assert f"{letter}: {entry['low_recipe']}, then {entry['high_recipe']}" in lines, out
        assert any(f"│ {letter} │ {entry['signal']} " in line for line in lines), out
    assert "…" not in out
    chosen, best = content["chosen"], content["best_alternative"]
    assert f"  cheap graph: {chosen['low_recipe']}" in lines
    assert f"  full graph:  {chosen['high_recipe']}" in lines
    assert f"  signal:      {chosen['signal']}" in lines
    threshold = next(line for line in lines if line.startswith("  threshold: "))
    assert float(threshold.split()[1].strip(";")) == chosen["threshold"]
    escalated = next(line for line in lines if line.startswith("  escalated: "))
    assert f"{chosen['measured']['escalation_rate']:.1%} of 245 fit images, " in escalated
    against = next(line for line in lines if line.startswith("  against: "))
    assert f"{best['recipe']}, the best single graph that agrees as often" in against
    assert f"it costs {best['cost_ratio_to_plan']:.2f} times as much" in against
    assert f"{chosen['measured']['speedup']:.2f} times less than the full model" in out
    assert (
        "next: python -m export repository --onnx build/plan/onnx --calibration "
        "build/plan/calibration.json --instances 2"
    ) in lines
    _try_next_command(next(line for line in lines if line.startswith("next: ")))
    assert content["chosen"]["signal"] in words
    files = {file.name for file in (tmp_path / "build/plan").iterdir()}
    assert {"plan.json", "plan.html", "onnx", "calibration.json", "outputs.json"} <= files
    assert (tmp_path / "build/plan/plan.html").stat().st_size > 10_000


def test_a_plan_that_adapts_says_so_wherever_it_is_read(run, tmp_path):
    code, out, err = run(*PLAN, "--images", "images", "--max-risk", 0.07, "--adapt", 2.5)
    assert code == 0, err
    content = json.loads((tmp_path / "build/plan/plan.json").read_text())
    recipe, lines = content["chosen"]["low_recipe"], out.splitlines()
    assert "adapted=" in recipe and content["images"]["adapt"] == 350
    assert f"  cheap graph: {recipe} (adapted in 2.5 minutes to 350 images)" in lines
    (trained,) = content["adaptation"]["trained"]
    assert trained["line"] in lines and trained["line"] in err.replace("\n", "")
    page = " ".join(" ".join(Page(tmp_path / "build/plan/plan.html").sections.values()).split())
    assert f"4 px, adapted ({trained['adapted']})" in page
    assert "cheap candidate; adapted in 2.5 minutes to 350 images" in page
    assert "adapt 350 set aside to adapt the weights of cheap graphs to" in page
    _try_next_command(next(line for line in lines if line.startswith("next: ")))
    served = json.loads((tmp_path / "build/plan/onnx/graphs.json").read_text())
    assert served["graphs"][content["chosen"]["low"]]["adapted_on"]


def _try_next_command(line):
    """The command that was printed, but for where it writes, is one that works."""
    _, _, _, module, *arguments = shlex.split(line)
    assert module == "export"
    commands.said("export", *arguments, "--out", "model_repository")
    assert Path("model_repository/MANIFEST.json").is_file()


@pytest.mark.parametrize(
    ("ratio", "words"), [(1.5, "it costs 1.50 times"), (0.5, "WINS: it costs 0.50")]
)
def test_where_a_single_graph_costs_less_it_says_so(run, ratio, words):
    content = plan_content()
    content["best_alternative"]["cost_ratio_to_plan"] = ratio
    assert words in "\n".join(_chosen(content, make_request(Path("out"))))


def test_what_depends_on_the_image_is_printed_with_its_spread_and_as_a_mean(run):
    cheap = "px4_int8static_align"
    run.workshop._varied = {cheap: varied(0.62, 0.41, 0.88), "px4": varied(0.62, 0.41, 0.88)}
    code, out, err = run(*PLAN, "--images", "images", *RISK)
    assert code == 0, err
    lines = out.splitlines()
    assert (
        "px=4,int8=static,align: cost of a lone image 0.62 (0.41 to 0.88 by image) of the full "
        "model's"
    ) in lines
    (cost,) = [line for line in lines if line.startswith("  cost: ")]
    assert "than the full model, as a mean over images: what the cheap graph costs depends" in cost
    run.workshop._busy = 1
    code, out, _ = run(*PLAN, "--images", "images", *RISK)
    assert code == 0 and "lone image depends on the image" in out and "0.62" not in out
    run.workshop._varied = {}
    assert "by image" not in (plain := run(*PLAN, "--images", "images", *RISK)[1])
    assert "mean over images" not in plain


def test_on_a_busy_machine_no_ratio_is_printed_or_drawn(run, tmp_path):
    run.workshop._busy = 1
    code, out, err = run(*PLAN, "--images", "images", *RISK)
    assert code == 0, err
    assert "the machine was too busy for a figure" in out and "certificate: With" in out
    assert "ms per image" not in out and not re.search(r"\d times|costs \d|WINS", out), out
    row = next(line for line in out.splitlines() if line.startswith("│ A │"))
    assert row.count("–") == 2  # milliseconds and speed-up
    content = json.loads((tmp_path / "build/plan/plan.json").read_text())
    assert content["disturbed"]
    page = Page(tmp_path / "build/plan/plan.html")
    said = " ".join(page.sections.values())
    assert "The machine was too busy for a figure" in said and "not believed" in said
    assert not re.search(r"\d×|\d times", said), said
    assert "Not drawn" in said


def test_a_plan_that_can_certify_nothing_exports_nothing_and_is_no_result(run, tmp_path):
    code, out, err = run(*PLAN, "--images", "images", "--max-risk", 0.001)
    assert code == 2 and out == ""
    assert "700 images are too few: a risk of at most 0.1 % with confidence 90 % takes 2302" in err
    assert not run.workshop.used["export"]
    assert not (tmp_path / "build/plan").exists()


def test_json_is_all_that_is_printed_on_stdout(run, tmp_path):
    code, out, _ = run(*PLAN, "--images", "images", *RISK, "--json", "--out", "elsewhere")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "elsewhere/plan.json").read_text())


def test_where_nothing_is_certified_it_says_so_and_can_fail(run, tmp_path):
    strict = (*PLAN, "--highs", "int8=static", "--images", "images", "--max-risk", 0.02)
    code, out, _ = run(*strict)
    assert code == 0
    assert "no cascade is certified: keep serving the full model" in " ".join(out.split())
    assert not (tmp_path / "build/plan/onnx").exists()
    assert json.loads((tmp_path / "build/plan/plan.json").read_text())["chosen"] is None
    assert run(*strict, "--require-certificate")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "images"), "--max-risk"),
        (RISK, "--images"),
        (("--images", "nowhere", *RISK), "no such folder: nowhere"),
        (("--images", "empty", *RISK), "below empty"),
        (("--images", "images", "--max-risk", 5), "--max-risk 5.0"),
        (("--images", "images", *RISK, "--confidence", 90), "--confidence 90.0"),
        (("--images", "images", *RISK, "--candidates", "px=4,int8"), "use int8=static"),
        (
            ("--images", "images", *RISK, "--fidelity", "top5"),
            "'top5' is none of top1, labels, value, cosine",
        ),
        (("--images", "images", *RISK, "--tolerance", 3), "--tolerance 3.0"),
        (("--images", "images", *RISK, "--relative"), "--relative goes with --fidelity value"),
        (("--images", "images", *RISK, "--fidelity", "value"), "needs --tolerance X"),
        (
            ("--images", "images", *RISK, "--fidelity", "labels"),
            "labels means nothing for a model that answers one of several classes",
        ),
        (("--images", "images", *RISK, "--group-by", "colour"), "'colour' is none of"),
        (("--images", "images", *RISK, "--limit", 0), "--limit"),
        (("--images", "images", *RISK, "--adapt", 0.5), "--adapt 0.5 is no time to train in"),
        (("--images", "images", *RISK, "--adapt", 9, "--limit", 90), "90 groups of images are too"),
        (
            ("--images", "images", *RISK, "--candidates", "px=4,adapted=nowhere"),
            "--candidates px=4,adapted=nowhere: adapted=nowhere: no",
        ),
        (("--images", "images", *RISK, "--instances", 0), "--instances"),
        (("--images", "images", *RISK, "--limit", 20), "20 images are too few to split"),
        (("--images", "images", *RISK, "--test-share", 0.9), "--test-share"),
        (("--images", "images", *RISK, "--cache", "images/0000.png"), "images/0000.png"),
        (("--images", "images", *RISK, "--answers", "images/0000.png"), "images/0000.png"),
        (("--images", "images", *RISK, "--out", "images/0000.png"), "images/0000.png is a file"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(run, arguments, message):
    code, _, err = run(*PLAN, *arguments)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err
    assert not run.workshop.used["export"]


STUDY = ("study", "--model", "tiny", "--candidates", "px=4")


@pytest.mark.parametrize("verb", [PLAN, STUDY])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels", "cat"), "--labels names 1; give two or more"),
        (("--labels", "cat,dog,cat"), "--labels names 'cat' twice"),
        (("--labels", "none.txt"), "--labels none.txt: no such file"),
        (("--labels", "cat,dog", "--prompt", "a photo"), "--prompt 'a photo' has no {}"),
        (("--prompt", "a {}"), "--prompt is the sentence around --labels"),
        (
            ("--labels", "cat,dog", "--head-images", "images"),
            "--head-images DIR and --labels are two heads; give one",
        ),
        (("--checkpoint", "x.pth"), "--checkpoint FILE goes with --model timm:NAME"),
    ],
)
def test_a_head_of_texts_that_cannot_be_is_refused_before_a_model_is_loaded(
    run, verb, options, message
):
    code, out, err = run(*verb, "--images", "images", *RISK, *options)
    assert code == 2 and out == ""
    assert err.startswith(f"error: {message}") and len(err.splitlines()) == 1
    assert not run.workshop.used


@pytest.mark.parametrize("verb", [PLAN, STUDY])
def test_labels_prompt_and_checkpoint_are_what_the_model_is_loaded_by(run, verb, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ngrey  dog\n")
    asked = (*verb, "--images", "images", "--max-risk", 0.001)  # refused once the model is known
    assert run(*asked, "--labels", "labels.txt", "--prompt", "a {}")[0] == 2
    timm = ("--model", "timm:vit_tiny_patch4_16", "--checkpoint", "weights.pth")
    assert run(*asked, *timm)[0] == 2
    texts, weights = run.workshop.loaded
    assert (texts.texts, texts.checkpoint) == (Texts(("cat", "grey dog"), "a {}"), None)
    assert (weights.model, weights.texts, weights.checkpoint) == (timm[1], None, Path(timm[3]))


def test_images_that_cannot_be_read_are_one_line(run, tmp_path):
    folder = write_images(tmp_path / "broken", *(f"{i}.png" for i in range(50)))
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    plain = ("--candidates", "px=4", "--highs", "fp32")
    code, _, err = run(*PLAN, *plain, "--images", "broken", *RISK)
    assert code == 2
    assert "50 of 50 images could not be read" in err.splitlines()[-1]


def test_the_verb_as_it_was_called_says_where_it_is(monkeypatch, capsys):
    from calibration.__main__ import main as calibration_main

    monkeypatch.setattr(sys, "argv", ["calibration", *map(str, (*PLAN, *RISK))])
    with pytest.raises(SystemExit) as stop:
        calibration_main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: plan moved: python -m planner plan, with the same options\n"
    )
