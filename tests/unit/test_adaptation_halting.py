"""Gates that are trained: they begin informed and halt at their depth, or are no state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from adaptation import distil as road
from adaptation.halting import begin, penalty
from adaptation.request import AdaptationError
from adaptation.teacher import View
from adaptation.training import Held, Run, Settings
from bundle.recipe import Recipe
from export.errors import UsageError
from export.pretrained import pretrained
from export.recipes.halting import Halting
from tests.unit.adapting import adapt, lesson, request, write_pictures
from tests.unit.export_tiny import PX, save_tiny

LAYERS, DEPTH = 6, 3.0
RECIPE = "halt=3"
WIDE = {"intermediate_size": 128, "mlp_ratio": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = ("ViTModel", "Dinov2Model", "Dinov2WithRegistersModel")
    return {
        # Wide MLPs: what they are given must tell the class token from others.
        name: pretrained(str(save_tiny(folder / name, name, num_hidden_layers=LAYERS, **WIDE)))
        for name in names
    }


@pytest.fixture
def backbone(backbones):
    return backbones["Dinov2Model"]


def begun(backbone, images, depth=DEPTH):
    rung = backbone.trainable(Recipe.parse(RECIPE).at(PX)).rung
    begin(rung, images, depth, seed=0)
    return rung


def pictures(count, seed=0):
    return torch.randn(count, 3, PX, PX, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"])
def test_tokens_halt_near_the_depth_before_anything_is_learned(name, backbones):
    seen = []
    for depth in (2.0, 4.0):
        rung = begun(backbones[name], pictures(24), depth)
        with torch.inference_mode():
            _, _, tokens, patches = rung(pictures(24))
        seen.append(float(patches.float().mean()))
        assert abs(seen[-1] - depth) < 0.5
        # Class tokens do not halt, so that hardly an image is done early.
        assert (tokens[:, -1] >= 1).float().mean() >= 0.8
    assert seen[0] < seen[1] - 1


def test_the_first_coordinate_says_what_the_class_token_will_not_look_at(backbone):
    """Tokens halt in the order in which the full model's class token looks at them least."""
    base, images = backbone.model, pictures(24)
    with torch.inference_mode():
        attentions = base(images, output_attentions=True).attentions
        rung = begun(backbone, images)
        patches = rung(images)[-1].float()
    looked = torch.stack(attentions[int(DEPTH / 2) :]).sum(dim=(0, 2))[:, 0, 1:]  # (B, N)
    first, last = patches <= 2, patches >= 5
    assert first.any() and last.any()
    assert looked[first].mean() < looked[last].mean()


def test_beginning_changes_rows_of_the_first_coordinate_alone(backbone):
    rung = begun(backbone, pictures(24))
    plain = backbone.trainable(Recipe.parse(RECIPE).at(PX)).rung
    for (name, new), old in zip(
        rung.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        changed = (new != old).nonzero()
        if "mlp.fc2" in name:
            assert len(changed) and (changed[:, 0] == 0).all(), name
        else:
            assert not len(changed), name
    assert float(rung.own.scale) > 0


def test_without_halting_the_answer_is_nearly_the_plain_one(backbone):
    rung, images = begun(backbone, pictures(24)), pictures(24)
    rung.own.centre.fill_(1e4)
    with torch.inference_mode():
        found, plain = rung(images)[0], backbone.rung(Recipe(PX))(images)[0]
    assert torch.cosine_similarity(found, plain).mean() > 0.9
    # All blocks, and all of a share lacked before the last.
    assert float(rung.seen.ponder) == pytest.approx(LAYERS + 1)


def test_ponder_and_prior_by_hand():
    at_depth = Halting(
        torch.tensor(3.0), torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1]), torch.tensor(3.0)
    )
    early = replace(at_depth, shares=torch.tensor([0.9, 0.1, 0.0, 0.0, 0.0]))
    assert penalty(at_depth, 3.0) < penalty(early, 3.0)
    assert penalty(replace(at_depth, ponder=torch.tensor(5.0)), 3.0) - penalty(
        at_depth, 3.0
    ) == pytest.approx(2 * 5e-4, rel=1e-3)
    wanted = np.exp(-0.5 * (np.arange(1, 6) - 3.0) ** 2)
    wanted /= wanted.sum()
    found = np.clip(early.shares.numpy() / early.shares.sum().item(), 0.01, 0.99)
    divergence = float((wanted * np.log(wanted / found)).sum())
    assert float(penalty(early, 3.0)) == pytest.approx(0.1 * divergence + 5e-4 * 3, rel=1e-4)


def test_the_gate_gets_a_gradient_from_what_is_to_halt(backbone):
    rung = begun(backbone, pictures(24))
    weights = [block.mlp.modules() for block in rung.blocks][1]
    last = [part for part in weights if isinstance(part, torch.nn.Linear)][-1].weight
    last.requires_grad_(True)
    rung(pictures(8))
    penalty(rung.seen, 2.0).backward()
    assert last.grad is not None and last.grad[0].abs().sum() > 0


def test_a_trained_gate_is_written_exported_and_halts(backbone, images, tmp_path):
    result = adapt(backbone, request(tmp_path, images, RECIPE))
    assert result.best.depth is not None and result.start.depth is not None
    assert result.adapted is not None, result.lines()
    assert result.best.depth <= 1.05 * DEPTH
    assert f"{result.best.depth:.1f} blocks a token" in result.lines()[0]
    recipe = Recipe.parse(f"{RECIPE},adapted={result.adapted.folder}")
    known, recipe = backbone.knowing(recipe, PX)
    known.check(recipe, PX)
    with torch.inference_mode():
        *_, tokens, patches = known.rung(recipe).eval()(pictures(8))
    assert tokens.dtype == patches.dtype == torch.int32
    assert (tokens[:, 0] == PX**2 // 16 + 1).all() and tokens[:, -1].float().mean() < tokens[0, 0]


def test_a_gate_that_halts_too_late_is_no_state(backbone, images, tmp_path):
    learned = replace(lesson(backbone, request(tmp_path, images, RECIPE)), depth=DEPTH)
    run = Run(backbone.trainable(Recipe.parse(RECIPE).at(PX)), learned, Settings(1e-4), 4)
    run.look()
    first = run.curve[0]
    better = replace(first.held_out, distance=0.0, acceptable=1.0, cosine=1.0)
    start = replace(first, held_out=Held(1.0, 0.0, 0.0, 3.0))
    for depth, helps in ((DEPTH, True), (1.05 * DEPTH, True), (1.1 * DEPTH, False), (None, True)):
        point = replace(first, held_out=replace(better, depth=depth))
        assert learned.helps(point, start) == helps
    # The start is a state, too, and one that halts too late no rival, however good it is.
    assert learned.helps(start, start)
    late = replace(first, held_out=replace(better, depth=1.1 * DEPTH))
    worse = replace(first, held_out=Held(2.0, 0.0, 0.0, DEPTH))
    assert not learned.helps(late, late)
    assert learned.helps(worse, late) and not learned.helps(worse, start)
    # Without a depth of its own a gate may not halt later than it did.
    free = replace(learned, depth=None)
    assert not free.helps(late, start) and free.helps(
        replace(late, held_out=replace(better, depth=3.0)), start
    )


@pytest.mark.parametrize("recipe", ["px=8,halt", "halt=3", "px=8"])
def test_a_model_that_halts_by_itself_teaches(recipe, backbones, images, tmp_path):
    """Its own tokens are gone at the end, so that no patch token is matched."""
    gated = begun(backbones["ViTModel"], pictures(24))
    backbone = replace(
        backbones["ViTModel"],
        model=gated.model,
        gate=(float(gated.own.scale), float(gated.own.centre)),
    )
    result = adapt(backbone, request(tmp_path, images, recipe, epochs=2))
    assert result.best.depth is not None
    assert np.isfinite(result.best.distance)


def test_the_first_coordinate_is_fitted_on_images_of_all_that_there_are(
    backbone, images, tmp_path, monkeypatch
):
    """Folders are often sorted by what is on the pictures."""
    seen = []

    def watch(rung, tensors, *args):
        seen.append(tensors)
        begin(rung, tensors, *args)

    monkeypatch.setattr(road, "begin", watch)
    asked = request(tmp_path, images, RECIPE, epochs=1)
    adapt(backbone, asked)
    learned = lesson(backbone, asked)
    last = learned.teacher.batch([View(learned.learned[-1], 0)]).image[0]
    assert any(torch.equal(last, one) for one in seen[0])


@pytest.mark.parametrize(
    ("centre", "line"), [(1e4, "the gate never opens: nothing is saved by it"), (6, "asked for")]
)
def test_a_gate_that_never_halts_says_so_and_nothing_is_written(
    centre, line, backbone, images, tmp_path, monkeypatch
):
    def shut(rung, *args):
        begin(rung, *args)
        rung.own.centre.add_(centre)

    monkeypatch.setattr(road, "begin", shut)
    result = adapt(backbone, request(tmp_path, images, "halt=2", epochs=2))
    assert result.adapted is None
    assert line in result.lines()[1]
    assert not (tmp_path / "state" / "adapted.json").exists()


def test_a_resumed_gate_ends_in_the_same_bits(backbone, images, tmp_path):
    from tests.unit.adapting import interrupting

    whole = adapt(backbone, request(tmp_path / "one", images, RECIPE, epochs=4))
    asked = request(tmp_path / "two", images, RECIPE, epochs=4)
    with pytest.raises(KeyboardInterrupt):
        adapt(backbone, asked, interrupting(4))
    again = adapt(backbone, replace(asked, resume=True))
    assert whole.adapted is not None and again.adapted is not None
    assert whole.adapted.sha256 == again.adapted.sha256


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("halt", "halt says no depth to train for"),
        ("halt=6", "tokens can halt after 1 to fewer than 6 blocks"),
        ("halt=0.5", "tokens can halt after 1 to fewer than 6 blocks"),
        ("halt=2,tome=2", "take tokens away"),
        ("halt=2,apt=5", "take tokens away"),
    ],
)
def test_gates_that_cannot_be_trained_are_refused_at_once(recipe, line, backbone, images, tmp_path):
    with pytest.raises((UsageError, AdaptationError), match=line):
        adapt(backbone, request(tmp_path, images, recipe))


def test_apt_learns_its_detail(images, tmp_path):
    """The path that begins at zero, and the tables of coarse cells, are trained with the rest."""
    backbone = pretrained(str(save_tiny(tmp_path / "model", "ViTForImageClassification")))
    result = adapt(backbone, request(tmp_path, images, "apt=9"))
    assert result.adapted is not None, result.lines()
    recipe = Recipe.parse(f"apt=9,adapted={result.adapted.folder}")
    known, recipe = backbone.knowing(recipe, PX)
    student = known.rung(recipe)
    assert student.own.zero.weight.abs().sum() > 0
    fresh = backbone.trainable(Recipe.parse("apt=9").at(PX)).own
    assert not torch.equal(student.own.tables[0], fresh.tables[0])
    with torch.inference_mode():
        embedding, _, logits, tokens, patches = student.eval()(pictures(3))
        torch.testing.assert_close(logits, backbone.linear_head(embedding))
    assert logits.shape == (3, 3) and tokens.shape == (3, 1) and patches.shape == (3, 16)
