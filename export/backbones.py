"""What every backbone offers, and the torch module of one rung of it.

A backbone is a `transformers` ViT, DeiT or DINOv2. Per-layer CLS tokens are the library's own
`hidden_states` and logits its own head's, so nothing of a model's forward is copied here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from export.errors import UsageError
from imaging import Preprocessing

# The attention matrix of 4,096 patches (64 x 64) takes 3 GB at batch 8 and 6 heads, the largest
# batch of the parity check.
MAX_PATCHES = 64 * 64


@dataclass(frozen=True)
class RungSpec:
    """One rung: what it is called and how it is made from the full-resolution image.

    Attributes:
        name: model name on the server, and stem of the ONNX file.
        px: side of the square image the transformer itself sees, in pixels.
    """

    name: str
    px: int

    @property
    def recipe(self) -> str:
        """How the rung makes itself cheap, in a form that a record can keep."""
        return f"px={self.px}"


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
        probe: a linear head fitted here, on the final CLS embedding; it takes the place of the
            model's own head.
        notices: what the user should know about how the model was read.
    """

    name: str
    source: dict[str, Any]
    model: PreTrainedModel
    labels: tuple[str, ...] | None
    default_px: tuple[int, int]
    preprocessing: Callable[[int], Preprocessing]
    probe: nn.Linear | None = None
    notices: tuple[str, ...] = ()

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return int(self.model.config.patch_size)

    @property
    def embedding_dim(self) -> int:
        """D, the width of the model."""
        return int(self.model.config.hidden_size)

    @property
    def layers(self) -> int:
        """L, the number of transformer blocks."""
        return int(self.model.config.num_hidden_layers)

    @property
    def classes(self) -> int | None:
        """C, or None without a head."""
        if self.probe is not None:
            return self.probe.out_features
        return int(self.model.config.num_labels) if has_own_head(self.model) else None

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Each ONNX output's shape after the batch axis, in order."""
        shapes: dict[str, tuple[int, ...]] = {
            "embedding": (self.embedding_dim,),
            "cls_layers": (self.layers + 1, self.embedding_dim),
        }
        if self.classes is not None:
            shapes["logits"] = (self.classes,)
        return shapes

    def with_probe(self, probe: nn.Linear, labels: tuple[str, ...]) -> Backbone:
        """The same backbone under a fitted linear head, its own head dropped."""
        return replace(self, model=base_model(self.model), probe=probe.eval(), labels=labels)

    def check_px(self, low_px: int, high_px: int) -> None:
        """Refuse resolutions that the model cannot run at.

        Raises:
            UsageError: not a multiple of the patch size, too many patches, or low >= high.
        """
        for option, px in (("--low-px", low_px), ("--high-px", high_px)):
            _check_multiple(option, px, self.patch_size)
        if low_px >= high_px:
            raise UsageError(
                f"--low-px {low_px} must be below --high-px {high_px}; a low rung saves by that"
            )

    def rung(self, px: int) -> RungModule:
        """The module to export for a resolution, its position table interpolated beforehand."""
        return RungModule(bake_positions(self.model, px), px, self.probe)

    @torch.inference_mode()
    def reference(self, image: torch.Tensor, px: int) -> dict[str, torch.Tensor]:
        """What the library itself answers: the truth that a rung is checked against.

        The unaltered model, interpolating its position table as it runs; the embedding comes from
        the base model's normalised output and the logits from the model's own head, each through
        its own forward.

        Args:
            image: FP32 (B, 3, H, W).
            px: the rung's resolution.

        Returns:
            `embedding` (B, D), `cls_layers` (B, L+1, D) and, with a head, `logits` (B, C).
        """
        pixels = downsample(image, px)
        options = _interpolate_option(self.model)
        base = base_model(self.model)(pixels, output_hidden_states=True, **options)
        outputs = {
            "embedding": base.last_hidden_state[:, 0],
            "cls_layers": torch.stack([hidden[:, 0] for hidden in base.hidden_states], dim=1),
        }
        if self.probe is not None:
            outputs["logits"] = self.probe(outputs["embedding"])
        elif has_own_head(self.model):
            outputs["logits"] = self.model(pixels, **options).logits
        return outputs


class RungModule(nn.Module):
    """`image` at full resolution to `embedding`, `cls_layers` and, with a head, `logits`."""

    def __init__(self, model: PreTrainedModel, px: int, probe: nn.Linear | None) -> None:
        super().__init__()
        self.model = model
        self.px = px
        self.probe = probe

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the rung.

        Args:
            image: FP32 (B, 3, H, W), normalised, at the full rung's resolution.

        Returns:
            embedding (B, D), cls_layers (B, L+1, D)[, logits (B, C)].
        """
        output = self.model(pixel_values=downsample(image, self.px), output_hidden_states=True)
        cls_layers = torch.stack([hidden[:, 0] for hidden in output.hidden_states], dim=1)
        if "last_hidden_state" in output:
            embedding = output.last_hidden_state[:, 0]
        else:
            # Models with a head do not return the normalised tokens. LayerNorm works token by
            # token, so normalising the last block's CLS alone gives the same vector.
            embedding = base_model(self.model).layernorm(cls_layers[:, -1])
        if self.probe is not None:
            return embedding, cls_layers, self.probe(embedding)
        if "logits" in output:
            return embedding, cls_layers, output.logits
        return embedding, cls_layers


def downsample(image: torch.Tensor, px: int) -> torch.Tensor:
    """Shrink (B, 3, H, W) to (B, 3, px, px), antialiased as Pillow's bicubic is.

    One ONNX `Resize` node (opset 18 brought antialiasing). Linear, so it commutes with the
    normalisation already applied.
    """
    if image.shape[-2:] == (px, px):
        return image
    return nn.functional.interpolate(
        image, size=(px, px), mode="bicubic", align_corners=False, antialias=True
    )


def bake_positions(model: PreTrainedModel, px: int) -> PreTrainedModel:
    """A copy of the model whose stored position table fits one resolution.

    The table is the library's own interpolation, computed once; the exported graph then holds a
    constant instead of a bicubic resize of constants.

    Args:
        model: a ViT, DeiT or DINOv2, with or without its head.
        px: the resolution, a multiple of the patch size.
    """
    baked = copy.deepcopy(model)
    embeddings = base_model(baked).embeddings
    table = embeddings.position_embeddings  # (1, S + N, D), S special tokens: CLS (and DeiT's)
    special = table.shape[1] - embeddings.patch_embeddings.num_patches
    patches = (px // int(model.config.patch_size)) ** 2
    tokens = torch.zeros(1, special + patches, table.shape[2])
    with torch.no_grad():
        fitted = embeddings.interpolate_pos_encoding(tokens, px, px)
    embeddings.position_embeddings = nn.Parameter(fitted.clone(), requires_grad=False)
    embeddings.image_size = (px, px)  # ViT and DeiT compare the input with it
    return baked.eval()


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; itself if it has none."""
    return model.base_model


def has_own_head(model: PreTrainedModel) -> bool:
    """Whether the model answers with logits."""
    return base_model(model) is not model


def nearest_multiples(px: int, patch_size: int) -> tuple[int, int]:
    """The multiples of the patch size on either side of px, both at least one patch."""
    below = max(patch_size, px // patch_size * patch_size)
    return below, below if px <= below else below + patch_size


def _check_multiple(option: str, px: int, patch_size: int) -> None:
    largest = int(MAX_PATCHES**0.5) * patch_size
    if px > largest:
        raise UsageError(f"{option} {px} is too large; {largest} px is the most for this model")
    below, above = nearest_multiples(px, patch_size)
    if px not in (below, above):
        choices = f"{below}" if below == above else f"{below} or {above}"
        raise UsageError(
            f"{option} {px} is no positive multiple of the patch size {patch_size}; use {choices}"
        )


def _interpolate_option(model: PreTrainedModel) -> dict[str, bool]:
    # DINOv2 always interpolates and takes no such argument.
    return {} if model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
