"""`python -m calibration` from a folder of unlabelled images to a certified artifact."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from bundle.alignment import Alignment
from bundle.prints import decode as known
from bundle.prints import encode
from calibration.outputs import Outputs
from tests import commands
from tests.unit.calibrating import run
from tests.unit.onnx_files import write_graph_set
from tests.unit.plan_workplace import write_shelf


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with rungs, 400 unlabelled images, and what `collect` stores of them."""
    folder = tmp_path_factory.mktemp("user")
    write_graph_set(folder / "build/onnx", seeds=(1, 1))
    write_images(folder / "images", 400, seed=0)
    run(folder, "collect", "--images", "images")
    return folder


def write_images(folder, count, seed):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        image = Image.new("RGB", (10, 10), colour)
        image.putpixel((i % 10, i // 10 % 10), (255, 255, 255))
        image.save(folder / f"{i:03d}.png")


def test_two_commands_from_a_folder_to_a_certified_artifact(workplace, capsys):
    assert run(workplace, "fit", "--max-risk", 0.1, "--require-certificate") == 0
    printed = capsys.readouterr().out
    artifact = json.loads((workplace / "build/calibration/calibration.json").read_text())
    assert artifact["certificate"]["certified"] and artifact["threshold"] is not None
    assert " ".join(artifact["certificate"]["statement"].split()) in " ".join(printed.split())
    assert str(workplace) not in json.dumps(artifact)  # no path of this machine is deployed


def test_the_page_is_written_and_its_analysis_can_be_json(workplace, capsys):
    assert run(workplace, "fit", "--max-risk", 0.1) == 0
    capsys.readouterr()
    assert run(workplace, "report") == 0
    assert "wrote build/calibration/report.html" in capsys.readouterr().out
    text = (workplace / "build/calibration/report.html").read_text()
    assert len(text) > 10_000 and "certif" in text
    assert run(workplace, "report", "--json") == 0
    assert json.loads(capsys.readouterr().out)["page"] == "build/calibration/report.html"


def test_what_is_not_certified_is_said_loudly_and_can_fail(workplace, capsys):
    out = ("--out", "build/strict/calibration.json")
    assert run(workplace, "fit", "--max-risk", 0.001, *out) == 0
    assert "NOT CERTIFIED" in capsys.readouterr().err
    assert run(workplace, "fit", "--max-risk", 0.001, "--require-certificate", *out) == 1
    artifact = json.loads((workplace / "build/strict/calibration.json").read_text())
    assert artifact["threshold"] is None


def test_evaluate_exits_1_where_new_images_contradict_the_certificate(workplace, capsys):
    """The artifact keeps everything low; another full rung then answers otherwise."""
    assert run(workplace, "fit", "--max-risk", 0.1) == 0
    if not (workplace / "later").exists():
        write_images(workplace / "later", 120, seed=1)
    capsys.readouterr()
    assert run(workplace, "evaluate", "--images", "later") == 0
    assert "Certificate not contradicted" in capsys.readouterr().out
    forged = json.loads((workplace / "build/calibration/calibration.json").read_text())
    write_graph_set(workplace / "other/onnx", seeds=(1, 7))  # a full rung that differs a lot
    rungs = json.loads((workplace / "other/onnx/graphs.json").read_text())["graphs"]
    for name, rung in rungs.items():
        forged["rungs"][name]["sha256"] = rung["sha256"]
    (workplace / "other/calibration.json").write_text(json.dumps(forged))
    other = ("--calibration", "other/calibration.json", "--onnx", "other/onnx")
    assert run(workplace, "evaluate", "--images", "later", *other) == 1
    assert "Certificate CONTRADICTED" in capsys.readouterr().out


def test_an_aligned_rung_is_calibrated_on_images_that_it_has_not_learned_from(tmp_path, capsys):
    """collect, align, `export align`, collect, fit: each command as it is printed."""
    write_shelf(tmp_path / "build/onnx", ["px=4"])
    write_images(tmp_path / "images", 400, seed=0)
    assert run(tmp_path, "collect", "--images", "images") == 0
    capsys.readouterr()
    assert run(tmp_path, "align", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["alignment"] == "build/calibration/alignment.npz" and printed["helps"]
    assert printed["growth"][0]["images"] == 0
    assert printed["growth"][-1]["acceptable"] > printed["growth"][0]["acceptable"]

    alignment = Alignment.load(tmp_path / printed["alignment"])
    learned = set(alignment.image_hashes)
    assert len(learned) == len(known(alignment.image_prints)[0]) == 140  # 35 % of the images
    onnx, baked = tmp_path / "build/onnx", tmp_path / printed["alignment"]
    commands.said("export", "align", "--onnx", onnx, "--alignment", baked)
    capsys.readouterr()
    assert run(tmp_path, "collect", "--images", "images") == 0
    assert run(tmp_path, "fit", "--max-risk", 0.2, "--reference-images", 0) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "140 images taught a graph or its head, in this or another form; nothing is cert" in said
    assert "140 images taught a graph without labels: they are fit images" in said
    artifact = json.loads((tmp_path / "build/calibration/calibration.json").read_text())
    assert artifact["data"]["images"] == 400
    assert artifact["data"]["splits"] == {"fit": 140, "certify": 260}
    outputs = Outputs.load(tmp_path / "build/calibration/outputs.json")
    with np.load(tmp_path / "build/calibration/calibration.fit.npz") as found:
        assert {outputs.hashes[row] for row in found["split_fit"]} == learned
    assert run(tmp_path, "report") == 0
    assert run(tmp_path, "evaluate", "--images", "images") == 2  # all seen, one way or the other
    assert "evaluate it on others" in capsys.readouterr().err

    (onnx / "px4_align.npz").unlink()  # what they would be answered is unknown now
    assert run(tmp_path, "fit", "--max-risk", 0.2, "--reference-images", 0) == 0
    assert "140 images taught a graph or its head" in capsys.readouterr().err
    artifact = json.loads((tmp_path / "build/calibration/calibration.json").read_text())
    assert artifact["data"]["images"] == 260


@pytest.mark.parametrize(
    ("arguments", "splits", "measured"),
    [
        (("--max-risk", 0.1), {"fit": 140, "certify": 260}, "140 fit images, cross-fitted, signal"),
        (
            ("--max-risk", 0.1, "--test-share", 0.25),
            {"fit": 105, "certify": 195, "test": 100},
            "100 test images, signal",
        ),
        (("--escalation-rate", 0.1), {"fit": 280, "test": 120}, "120 test images, signal"),
        (
            ("--escalation-rate", 0.1, "--test-share", 0),
            {"fit": 400},
            "400 fit images, cross-fitted, signal",
        ),
    ],
)
def test_the_table_names_the_images_that_it_is_of(workplace, capsys, arguments, splits, measured):
    out = ("--out", "build/splits/calibration.json")
    assert run(workplace, "fit", *arguments, *out) == 0
    assert measured in " ".join(capsys.readouterr().out.split())
    artifact = json.loads((workplace / "build/splits/calibration.json").read_text())
    assert artifact["data"]["splits"] == splits
    assert artifact["metrics"]["images"] == int(measured.split()[0])


def test_a_report_before_a_fit_leaves_out_what_taught_a_graph_and_refuses_others(tmp_path, capsys):
    write_graph_set(tmp_path / "build/onnx", seeds=(1, 2))
    write_images(tmp_path / "images", 60, seed=0)
    assert run(tmp_path, "collect", "--images", "images") == 0
    outputs = Outputs.load(tmp_path / "build/calibration/outputs.json")

    def taught(count):
        record = json.loads((tmp_path / "build/onnx/graphs.json").read_text())
        record["fitted_on"] = encode(outputs.hashes[:count], outputs.looks[:count])
        (tmp_path / "build/onnx/graphs.json").write_text(json.dumps(record))

    taught(20)
    capsys.readouterr()
    assert run(tmp_path, "report", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 40
    assert "20 images taught a graph or its head" in printed.err
    taught(60)
    assert run(tmp_path, "report") == 2
    assert "no image is left to show" in capsys.readouterr().err
    write_graph_set(tmp_path / "build/onnx", seeds=(1, 3))
    assert run(tmp_path, "report") == 2
    assert "not of these graphs: another vit_high; collect again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rungs"}, "not as the artifact's were: another vit_low"),
        ({"data"}, "of an earlier release"),
        ({"imaging_sha256"}, "other code of imaging/"),
    ],
)
def test_evaluate_refuses_an_artifact_before_any_image_is_read(
    workplace, capsys, monkeypatch, change, message
):
    assert run(workplace, "fit", "--max-risk", 0.1) == 0
    content = json.loads((workplace / "build/calibration/calibration.json").read_text())
    if change == {"data"}:
        del content["data"]["image_prints"]
    elif change == {"imaging_sha256"}:
        content["imaging_sha256"] = "e" * 64
    else:
        content["rungs"]["vit_low"]["sha256"] = "c" * 64
    (workplace / "changed.json").write_text(json.dumps(content))

    def never(*arguments):
        raise AssertionError("images are collected")

    monkeypatch.setattr("calibration.__main__.AnswerCache", never)
    capsys.readouterr()
    assert run(workplace, "evaluate", "--images", "images", "--calibration", "changed.json") == 2
    assert message in capsys.readouterr().err


def test_of_an_alignment_that_does_not_help_no_file_is_written(workplace, capsys):
    useless = workplace / "build/useless.npz"
    useless.write_bytes(b"of other images")
    assert run(workplace, "align", "--out", "build/useless.npz") == 0  # both rungs are one graph
    out = " ".join(capsys.readouterr().out.split())
    assert "an alignment does not help on images that it has not learned: none is written" in out
    assert "not aligned" in out and "wrote" not in out and not useless.exists()
    assert run(workplace, "align", "--out", "build/useless.npz", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["alignment"] is None and not printed["helps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "give one of --max-risk, --escalation-rate and --threshold"),
        (["fit", "--max-risk", 0.1, "--threshold", 1], "give one of"),
        (["fit", "--max-risk", 5], "--max-risk 5.0"),
        (["fit", "--max-risk", 0.1, "--confidence", 90], "--confidence 90.0"),
        (["fit", "--max-risk", 0.1, "--method", "hope"], "--method 'hope' is none of ltt, crc"),
        (["fit", "--max-risk", 0.1, "--signal", "stars"], "'stars' is unknown"),
        (["fit", "--max-risk", 0.1, "--group-by", "colour"], "--group-by 'colour' is none of"),
        (
            ["fit", "--max-risk", 0.1, "--fidelity", "top5"],
            "'top5' is none of top1, labels, value, cosine",
        ),
        (["fit", "--escalation-rate", 0.1, "--require-certificate"], "needs --max-risk"),
        (["fit", "--max-risk", 0.1, "--outputs", "none.npz"], "collect first"),
        (["fit", "--max-risk", 0.1, "--outputs", "empty.npz"], "empty.npz"),
        (["fit", "--max-risk", 0.1, "--out", "images/000.png/x.json"], "images/000.png"),
        (["collect", "--images", "nowhere"], "no such folder"),
        (["collect", "--images", "images", "--onnx", "nowhere"], "export rungs first"),
        (["collect", "--images", "images", "--onnx", "broken"], "vit_low.onnx"),
        (["collect", "--images", "images", "--out", "images/000.png/x.npz"], "images/000.png"),
        (["align", "--outputs", "none.npz"], "collect first"),
        (["align", "--onnx", "broken"], "not of these graphs: another vit_high; coll"),
        (["align", "--share", 2], "--share"),
        (["fit", "--max-risk", 0.1, "--test-share", 0.9], "--test-share"),
        (["align", "--group-by", "colour"], "--group-by 'colour' is none of"),
        (["align", "--out", "images/000.png/x.npz"], "images/000.png"),
        (["report", "--calibration", "none.json"], "calibration fit first"),
        (["evaluate", "--images", "images", "--calibration", "none.json"], "calibration fit"),
        (["fitt"], "No such command"),
        ([], "Missing command"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(workplace, capsys, arguments, message):
    (workplace / "empty.npz").touch()
    if not (workplace / "broken").exists():
        write_graph_set(workplace / "broken")
        (workplace / "broken/vit_low.onnx").write_bytes(b"torn")
    capsys.readouterr()
    assert run(workplace, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in error


def test_names_of_any_bytes_are_collected_shown_and_found_again(tmp_path, capsys):
    """Also by a second `collect`, which reads nothing anew."""
    write_graph_set(tmp_path / "build/onnx", seeds=(1, 2))
    images = tmp_path / os.fsdecode(b"\xe9t\xe9")
    write_images(images, 20, seed=0)
    for number, name in enumerate((b"caf\xe9", b"two\nlines", b"<script>", b"[red]\x1b[31m")):
        (images / f"{number:03d}.png").rename(images / (os.fsdecode(name) + ".png"))
    (images / os.fsdecode(b"\xff.mov")).write_bytes(b"")
    for _ in range(2):
        capsys.readouterr()
        assert run(tmp_path, "collect", "--images", images) == 0
        assert "of other kinds (.mov 1): \\xff.mov" in capsys.readouterr().err
    assert run(tmp_path, "report") == 0
    page = (tmp_path / "build/calibration/report.html").read_text("utf-8")
    for shown in (r"caf\xe9.png", r"two\nlines.png", "&lt;script&gt;.png", r"[red]\x1b[31m.png"):
        assert shown in page, shown
    assert "<script>.png" not in page and "image not" not in page
    assert r"\xe9t\xe9" in page  # the folder, as the source's title
