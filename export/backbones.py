"""What every backbone offers, and the torch module of one rung of it.

A backbone is a `transformers` model of a family in `export.families`. Per-layer CLS tokens are the
library's own `hidden_states` and logits its own head's, so nothing of a model's forward is copied
here; only `tome`, `apt` and `halt` run the library's weights by forwards of our own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bundle.adapted import Adapted
from bundle.recipe import Recipe
from export.errors import UsageError
from export.families import Family, family_of, has_head, tower
from export.onnx_graph import COUNTS
from export.recipes.adapted import AdaptedRung, sha256_of
from export.recipes.fewer_tokens import check_tokens
from export.recipes.halting import Gate, HaltingVit
from export.recipes.patch_sizes import Cells, PatchSizesVit, cell_tables, read_detail
from export.recipes.smaller import bake_positions, downsample, first_blocks
from export.recipes.token_merging import MergingVit
from imaging import Preprocessing
from routing import default_task

# The attention matrix of 4,096 patches (64 x 64) takes 3 GB at batch 8 and 6 heads, the largest
# batch of the parity check.
MAX_PATCHES = 64 * 64
UNTRAINED_GATE = (10.0, 30.0)  # where `adaptation` begins before it has looked at the model


@dataclass(frozen=True)
class Backbone:
    """A model with everything that export needs to know about it.

    Attributes:
        name: `static-vit`, `dinov2-small`, a directory's name or a hub id.
        source: where the weights come from (kind, and SHA-256, seed or revision), without paths.
        model: FP32, eval mode, eager attention (its ONNX graph is leaner than sdpa's); either a
            base model or one with a classification head.
        labels: one per class, or None.
        default_px: (low, high) used when the user gives none.
        preprocessing: from a resolution in pixels to the preprocessing the model was trained with.
        probe: a linear head fitted here, on the embedding, or made of texts; it takes the place of
            the model's own head.
        own_task: what the head answers, see `routing.TASKS`; None: its default.
        notices: what the user should know about how the model was read.
        texts: how `probe` was made of texts, ready for JSON; embeddings then have length 1, but
            for those of a rung that is aligned or adapted. None: it was not.
        adapted: states that recipes may name, by their keys.
        gate: scale and centre by which the model itself halts tokens; None: it does not.
        detail: what an APT state adds to coarse cells, see `patch_sizes.read_detail`; None: the
            model is of no such state.
    """

    name: str
    source: dict[str, Any]
    model: PreTrainedModel
    labels: tuple[str, ...] | None
    default_px: tuple[int, int]
    preprocessing: Callable[[int], Preprocessing]
    probe: nn.Linear | None = None
    own_task: str | None = None
    notices: tuple[str, ...] = ()
    texts: Mapping[str, Any] | None = None
    adapted: Mapping[str, Adapted] = field(default_factory=dict)
    gate: tuple[float, float] | None = None
    detail: Mapping[str, torch.Tensor] | None = None

    @property
    def family(self) -> Family:
        """What is particular about the model's family."""
        return family_of(self.model)

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return int(tower(self.model).config.patch_size)

    @property
    def embedding_dim(self) -> int:
        """D, the width of the model, or of what it projects to."""
        projection = getattr(self.model, "visual_projection", None)
        return self.layer_dim if projection is None else int(projection.out_features)

    @property
    def layer_dim(self) -> int:
        """The width of the model."""
        return int(tower(self.model).config.hidden_size)

    @property
    def layers(self) -> int:
        """L, the number of transformer blocks."""
        return int(tower(self.model).config.num_hidden_layers)

    @property
    def has_own_head(self) -> bool:
        """Whether the model itself answers with logits."""
        return has_head(self.model)

    @property
    def classes(self) -> int | None:
        """C, or None without a head."""
        if self.probe is not None:
            return self.probe.out_features
        return int(self.model.config.num_labels) if self.has_own_head else None

    @property
    def task(self) -> str | None:
        """What the logits mean, one of `routing.TASKS`; None without a head."""
        if self.classes is None:
            return None
        return self.own_task or ("classes" if self.probe else default_task(self.classes))

    def answering(self, task: str) -> Backbone:
        """The same backbone, its own head taken to answer another task.

        Raises:
            UsageError: without a head of its own or of texts, or one output as classes.
        """
        if self.classes is None or (self.probe is not None and self.texts is None):
            raise UsageError(f"--task {task} is about the model's own head, and it has none")
        if task == "classes" and self.classes == 1:
            raise UsageError("--task classes: one output names no class; give labels or value")
        return replace(self, own_task=task)

    def output_shapes(self, recipe: Recipe | None = None) -> dict[str, tuple[int, ...]]:
        """Each ONNX output's shape after the batch axis, in order; of the full model by default."""
        layers = self.layers if recipe is None or recipe.depth is None else recipe.depth
        shapes: dict[str, tuple[int, ...]] = {
            "embedding": (self.embedding_dim,),
            "cls_layers": (layers + 1, self.layer_dim),
        }
        if self.classes is not None:
            shapes["logits"] = (self.classes,)
        if recipe is not None and recipe.varies:
            patches = ((recipe.px or self.default_px[1]) // self.patch_size) ** 2
            counted = (1 if recipe.apt else layers,)
            shapes |= zip(COUNTS, (counted, (patches,)), strict=True)
        return shapes

    def with_probe(self, probe: nn.Linear, labels: tuple[str, ...]) -> Backbone:
        """The same backbone under a fitted linear head, its own head dropped."""
        model = tower(self.model) if self.has_own_head else self.model
        return replace(self, model=model, probe=probe.eval(), labels=labels, own_task=None)

    def to_be_probed(self) -> Backbone:
        """The same backbone as recipes are checked against before a linear head is fitted."""
        return self.with_probe(nn.Linear(self.embedding_dim, 1), ())

    def knowing(self, recipe: Recipe, image_px: int) -> tuple[Backbone, Recipe]:
        """Read the adapted state that a recipe names, if it names one.

        Args:
            recipe: its `adapted` is a folder, or the key of a state that is known.
            image_px: H = W of the input `image`, the resolution where the recipe names none.

        Returns:
            The backbone that knows the state, and the recipe with the state's key.

        Raises:
            AdaptedError: no such state, or it is of another recipe or another model.
        """
        recipe = recipe.at(image_px)
        if recipe.adapted is None:
            return self, recipe
        state = self.adapted.get(recipe.adapted) or Adapted.load(Path(recipe.adapted))
        state.check_teacher(self.weights_sha256, image_px)
        return replace(self, adapted={**self.adapted, state.key: state}), state.of(recipe)

    @property
    def weights_sha256(self) -> str:
        """Hex SHA-256 over all that makes embeddings: weights without a head, length, and gate.

        What a model with a projection answers, or one whose embeddings are made to have length 1,
        is another full model's answer than the bare transformer's.
        """
        found = sha256_of(tower(self.model) if self.has_own_head else self.model)
        if self.texts is not None:
            found = hashlib.sha256(f"{found} of length 1".encode()).hexdigest()
        if self.gate is not None:
            scale, centre = self.gate
            found = hashlib.sha256(f"{found} halts by {scale}, {centre}".encode()).hexdigest()
        return found

    @property
    def linear_head(self) -> nn.Linear | None:
        """What makes logits of the embedding alone; None: there are none, or they need more."""
        if self.probe is not None or not self.has_own_head or not self.aligns:
            return self.probe
        head: nn.Linear = self.model.classifier
        return head

    def check_px(self, px: int) -> None:
        """Refuse a resolution that the model cannot run at.

        Raises:
            UsageError: not a multiple of the patch size, or too many patches.
        """
        patch = self.patch_size
        largest = int(MAX_PATCHES**0.5) * patch
        if px > largest:
            raise UsageError(f"px={px} is too large; {largest} px is the most for this model")
        if px < patch or px % patch:
            below = px // patch * patch
            choices = f"{below} or {below + patch}" if below else f"{patch}"
            raise UsageError(
                f"px={px} is no positive multiple of the patch size {patch}; use {choices}"
            )

    @property
    def aligns(self) -> bool:
        """Whether logits follow from the embedding alone, so that an alignment reaches them."""
        own = self.probe is None and self.has_own_head
        return not own or type(self.model).__name__ in self.family.linear

    def check(self, recipe: Recipe, image_px: int, trains: bool = False) -> None:
        """Refuse a recipe that the model cannot be run by, before anything is exported.

        Args:
            recipe: of a graph.
            image_px: H = W of the input `image`, the resolution where the recipe names none.
            trains: whether its weights will be trained, so that they need not be there yet.

        Raises:
            UsageError: saying which part and why.
        """
        recipe = recipe.at(image_px)
        assert recipe.px is not None
        self.check_px(recipe.px)
        if recipe.px > image_px:
            raise UsageError(f"{recipe} looks at more than the full rung's {image_px} px")
        if recipe.depth is not None and not 1 <= recipe.depth < self.layers:
            raise UsageError(
                f"depth={recipe.depth} must be between 1 and {self.layers - 1}; the model has "
                f"{self.layers} blocks"
            )
        check_tokens(self, recipe, trains)
        if recipe.align and not self.aligns:
            raise UsageError(
                "align does not reach this model's head, which reads more than the CLS token; "
                "leave align out"
            )

    def rung(self, recipe: Recipe) -> nn.Module:
        """The module to export for a recipe's resolution, depth and way of having fewer tokens.

        Args:
            recipe: one that `check` lets pass, its resolution written out; its precision and
                alignment are the graph's business.
        """
        if recipe.adapted is not None:
            return self.trainable(recipe).adopt(self.adapted[recipe.adapted])
        return self._module(recipe)

    def trainable(self, recipe: Recipe) -> AdaptedRung:
        """The same module with the model's own weights, and an alignment that changes nothing.

        `adaptation` trains it; its weights are copies.
        """
        module = self._module(recipe, trains=True)
        return AdaptedRung(
            module,
            module.model,
            (self.embedding_dim, self.layer_dim),
            self.layers if recipe.depth is None else recipe.depth,
            self.aligns,
            self.linear_head,
        )

    def _module(
        self, recipe: Recipe, trains: bool = False
    ) -> RungModule | MergingVit | PatchSizesVit | HaltingVit:
        assert recipe.px is not None
        model = bake_positions(self.model, recipe.px)
        if recipe.depth is not None:
            model = first_blocks(model, recipe.depth)
        unit_length = self.texts is not None
        if recipe.tome:
            return MergingVit(model, recipe.px, recipe.tome, self.probe, unit_length)
        if recipe.apt:
            transform = self.preprocessing(recipe.px)
            return PatchSizesVit(
                *(model, recipe.px, recipe.apt, (transform.mean, transform.std)),
                *(self._cells(recipe, trains), self.probe, unit_length),
            )
        if recipe.halt is not None or self.gate is not None:
            gate, removes = Gate(*(self.gate or UNTRAINED_GATE)), recipe.halt is not None
            return HaltingVit(model, recipe.px, gate, self.probe, unit_length, removes)
        return RungModule(model, recipe.px, self.probe, unit_length)

    def _cells(self, recipe: Recipe, trains: bool) -> Cells:
        side = (recipe.px or 0) // self.patch_size
        tables = cell_tables(self.model, side, len(recipe.apt))
        cells = Cells(tables, trains or self.detail is not None)
        return cells if self.detail is None else read_detail(cells, self.detail)

    @torch.inference_mode()
    def reference(self, image: torch.Tensor, px: int) -> dict[str, torch.Tensor]:
        """What the library itself answers: the truth that a rung is checked against.

        The unaltered model, interpolating its positions as it runs; the embedding comes from the
        base model's own output and the logits from the model's own head, each through its own
        forward. No library has a model that halts tokens: of one, our own forward, which masks.

        Args:
            image: FP32 (B, 3, H, W).
            px: the rung's resolution.

        Returns:
            `embedding` (B, D), `cls_layers` (B, L+1, W) and, with a head, `logits` (B, C).
        """
        if self.gate is not None:
            module, names = self._module(Recipe(px)).eval(), list(self.output_shapes())
            return dict(zip(names, module(image), strict=True))
        pixels, family = downsample(image, px), self.family
        base = tower(self.model)(pixels, output_hidden_states=True, **family.options)
        embedding = family.truth(self.model, base, pixels)
        if self.texts is not None:
            embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        outputs = {
            "embedding": embedding,
            "cls_layers": torch.stack([family.cls(h) for h in base.hidden_states], dim=1),
        }
        if self.probe is not None:
            outputs["logits"] = self.probe(outputs["embedding"])
        elif self.has_own_head:
            outputs["logits"] = self.model(pixels, **family.options).logits
        return outputs


class RungModule(nn.Module):
    """`image` at full resolution to `embedding`, `cls_layers` and, with a head, `logits`."""

    def __init__(
        self,
        model: PreTrainedModel,
        px: int,
        probe: nn.Linear | None,
        unit_length: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.px = px
        self.probe = probe
        self.unit_length = unit_length
        self.family = family_of(model)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the rung.

        Args:
            image: FP32 (B, 3, H, W), normalised, at the full rung's resolution.

        Returns:
            embedding (B, D), cls_layers (B, L+1, W)[, logits (B, C)].
        """
        output = self.model(pixel_values=downsample(image, self.px), output_hidden_states=True)
        hidden_states = output.hidden_states
        cls_layers = torch.stack([self.family.cls(hidden) for hidden in hidden_states], dim=1)
        embedding = self.family.embedding(self.model, output, cls_layers)
        if self.unit_length:
            embedding = nn.functional.normalize(embedding)
        if self.probe is not None:
            return embedding, cls_layers, self.probe(embedding)
        if "logits" in output:
            return embedding, cls_layers, output.logits
        return embedding, cls_layers
