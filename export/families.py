"""The families of Vision Transformers that can be exported: what differs from one to the next.

Everything else about a model is the library's own: its forward, its weights, its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
)
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

Processors = Callable[[int], PilBackend]
IMAGENET: dict[str, Any] = {
    "image_mean": IMAGENET_DEFAULT_MEAN,
    "image_std": IMAGENET_DEFAULT_STD,
}


def tower(model: PreTrainedModel) -> Any:
    """The transformer that sees images, without heads and without a text tower."""
    if hasattr(model, "vision_model"):
        return model.vision_model
    return model if hasattr(model, "embeddings") else model.base_model


def vision_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the image tower; itself where it is all."""
    return getattr(config, "vision_config", config)


def _square(px: int) -> dict[str, int]:
    return {"height": px, "width": px}


def _cropped(px: int) -> PilBackend:
    return BitImageProcessorPil(
        size={"shortest_edge": round(px * 256 / 224)}, crop_size=_square(px), **IMAGENET
    )


@dataclass(frozen=True)
class Family:
    """Models whose embedding is the normalised CLS token.

    Attributes:
        title: as people call it.
        classes: architecture as config.json names it -> the class that is loaded, those with a head
            first: where the file names none, the first that lacks no weights is it.
        linear: of the loaded classes that classify, those whose logits are linear in the embedding,
            so that an alignment reaches them.
        usual: the preprocessing of the published checkpoints, for an image of so many pixels.
        blocks: where the transformer blocks lie, from the tower.
        norm: what normalises the last block's tokens.
        told: whether its forward must be told to interpolate the table of positions; it then
            refuses images of another size by itself.
        unmergeable: why tokens cannot be merged; None: they can.
        prompt: the usual sentence around a label of a zero-shot head; None: it has no text tower.
    """

    title: str
    classes: Mapping[str, str]
    usual: Processors
    linear: frozenset[str] = frozenset()
    blocks: str = "layers"
    norm: str = "layernorm"
    told: bool = True
    unmergeable: str | None = None
    prompt: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What its forward is told so that it takes images of any size."""
        return {"interpolate_pos_encoding": True} if self.told else {}

    def tokens(self, base: Any, pixels: torch.Tensor) -> torch.Tensor:
        """What the first block is given, (B, N, D), of pixels (B, 3, H, W)."""
        return self.entering(base, base.embeddings(pixels))

    def entering(self, base: Any, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block is given of embedded tokens that have their positions, (B, N, D)."""
        return tokens

    def cls(self, hidden: torch.Tensor) -> torch.Tensor:
        """What stands for the image after a block, (B, D), of its tokens (B, N, D)."""
        return hidden[:, 0]

    def embedding(
        self, model: PreTrainedModel, output: Any, cls_layers: torch.Tensor
    ) -> torch.Tensor:
        """The embedding (B, D) of what the model, with or without a head, has answered.

        Args:
            model: that has answered.
            output: its own, with the tokens of every layer.
            cls_layers: `cls` of each of those, (B, L + 1, W).
        """
        if "last_hidden_state" in output:
            return torch.as_tensor(output.last_hidden_state[:, 0])
        # Models with a head do not return the normalised tokens. LayerNorm works token by token,
        # so normalising the last block's CLS alone gives the same vector.
        normalise = getattr(tower(model), self.norm)
        return torch.as_tensor(normalise(cls_layers[:, -1]))

    def projected(self, model: PreTrainedModel, cls: torch.Tensor) -> torch.Tensor:
        """The embedding (B, E) of normalised CLS tokens (B, D)."""
        return cls

    def truth(self, model: PreTrainedModel, base: Any, pixels: torch.Tensor) -> torch.Tensor:
        """The embedding as the library itself returns it, from what the tower has answered."""
        return torch.as_tensor(base.last_hidden_state[:, 0])


class _Clip(Family):
    """The pooled output is the normalised CLS token; a projection takes it to the texts' space."""

    def entering(self, base: Any, tokens: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(base.pre_layrnorm(tokens))

    def embedding(
        self, model: PreTrainedModel, output: Any, cls_layers: torch.Tensor
    ) -> torch.Tensor:
        cls = tower(model).post_layernorm(cls_layers[:, -1])
        return self.projected(model, cls)

    def projected(self, model: PreTrainedModel, cls: torch.Tensor) -> torch.Tensor:
        project = getattr(model, "visual_projection", None)
        return cls if project is None else torch.as_tensor(project(cls))

    def truth(self, model: PreTrainedModel, base: Any, pixels: torch.Tensor) -> torch.Tensor:
        if hasattr(model, "visual_projection"):
            return torch.as_tensor(model(pixels, **self.options).image_embeds)
        return torch.as_tensor(base.pooler_output)


class _Siglip(Family):
    """No CLS token: the mean of the patch tokens stands for an image after each block.

    The embedding is what the attention pools, or the mean of the normalised tokens where a
    checkpoint has no such pooling (`vision_use_head`).
    """

    def cls(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mean(dim=1)

    def embedding(
        self, model: PreTrainedModel, output: Any, cls_layers: torch.Tensor
    ) -> torch.Tensor:
        base = tower(model)
        tokens = base.post_layernorm(output.hidden_states[-1])
        return torch.as_tensor(base.head(tokens) if base.use_head else tokens.mean(dim=1))

    def truth(self, model: PreTrainedModel, base: Any, pixels: torch.Tensor) -> torch.Tensor:
        pooled = base.pooler_output
        return base.last_hidden_state.mean(dim=1) if pooled is None else torch.as_tensor(pooled)


class _Beit(Family):
    """The embedding is the pooled output, by its config the mean of the patch tokens normalised.

    Without a pooler it is the CLS token.
    """

    def embedding(
        self, model: PreTrainedModel, output: Any, cls_layers: torch.Tensor
    ) -> torch.Tensor:
        base = tower(model)
        tokens = base.layernorm(output.hidden_states[-1])
        return torch.as_tensor(tokens[:, 0] if base.pooler is None else base.pooler(tokens))

    def truth(self, model: PreTrainedModel, base: Any, pixels: torch.Tensor) -> torch.Tensor:
        pooled = base.pooler_output
        return torch.as_tensor(base.last_hidden_state[:, 0] if pooled is None else pooled)


_TOLD_PLACES = "its attention is told where every patch lies"


def _classes(*pairs: str) -> dict[str, str]:
    """`A` loads as itself; `A=B`, an architecture that has more than is served, as B."""
    return {pair.partition("=")[0]: pair.rpartition("=")[2] for pair in pairs}


# By `model_type` of the tower's config.
FAMILIES: dict[str, Family] = {
    "vit": Family(
        "ViT",
        _classes("ViTForImageClassification", "ViTModel", "ViTForMaskedImageModeling=ViTModel"),
        lambda px: ViTImageProcessorPil(size=_square(px)),
        linear=frozenset({"ViTForImageClassification"}),
    ),
    "deit": Family(
        "DeiT",
        _classes(
            "DeiTForImageClassificationWithTeacher",
            "DeiTForImageClassification",
            "DeiTModel",
            "DeiTForMaskedImageModeling=DeiTModel",
        ),
        lambda px: DeiTImageProcessorPil(
            size=_square(round(px * 256 / 224)), crop_size=_square(px), **IMAGENET
        ),
        linear=frozenset({"DeiTForImageClassification"}),
    ),
    "dinov2": Family(
        "DINOv2",
        _classes("Dinov2ForImageClassification", "Dinov2Model", "Dinov2Backbone=Dinov2Model"),
        _cropped,
        blocks="encoder.layer",
        told=False,
    ),
    "dinov2_with_registers": Family(
        "DINOv2 with registers",
        _classes(
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersBackbone=Dinov2WithRegistersModel",
        ),
        _cropped,
        blocks="encoder.layer",
        told=False,
    ),
    "dinov3_vit": Family(
        "DINOv3",
        _classes("DINOv3ViTModel", "DINOv3ViTBackbone=DINOv3ViTModel"),
        lambda px: ViTImageProcessorPil(size=_square(px), **IMAGENET),
        blocks="model.layer",
        norm="norm",
        told=False,
        unmergeable=_TOLD_PLACES,
    ),
    "vit_msn": Family(
        "MSN",
        _classes("ViTMSNForImageClassification", "ViTMSNModel"),
        lambda px: ViTImageProcessorPil(size=_square(px), **IMAGENET),
        linear=frozenset({"ViTMSNForImageClassification"}),
    ),
    # Its encoder is a ViT, and loaded as one: nothing is masked then.
    "vit_mae": Family(
        "MAE",
        _classes("ViTMAEModel", "ViTMAEForPreTraining=ViTMAEModel"),
        lambda px: ViTImageProcessorPil(size=_square(px), **IMAGENET),
    ),
    "beit": _Beit(
        "BEiT",
        _classes("BeitForImageClassification", "BeitModel", "BeitForMaskedImageModeling"),
        lambda px: BeitImageProcessorPil(size=_square(px), resample=PILImageResampling.BILINEAR),
        linear=frozenset({"BeitForImageClassification"}),
        told=False,
        unmergeable=_TOLD_PLACES,
    ),
    "data2vec-vision": _Beit(
        "Data2Vec",
        _classes("Data2VecVisionForImageClassification", "Data2VecVisionModel"),
        lambda px: BeitImageProcessorPil(size=_square(px)),
        linear=frozenset({"Data2VecVisionForImageClassification"}),
        blocks="encoder.layer",
        told=False,
        unmergeable=_TOLD_PLACES,
    ),
    "clip_vision_model": _Clip(
        "CLIP",
        _classes(
            "CLIPForImageClassification",
            "CLIPModel",
            "CLIPVisionModelWithProjection",
            "CLIPVisionModel",
        ),
        lambda px: CLIPImageProcessorPil(size={"shortest_edge": px}, crop_size=_square(px)),
        blocks="encoder.layers",
        norm="post_layernorm",
        prompt="a photo of a {}.",
    ),
    "siglip_vision_model": _Siglip(
        "SigLIP",
        _classes("SiglipForImageClassification", "SiglipModel", "SiglipVisionModel"),
        lambda px: SiglipImageProcessorPil(size=_square(px)),
        blocks="encoder.layers",
        norm="post_layernorm",
        unmergeable="its pooling would weigh a merged token as one patch",
        prompt="This is a photo of {}.",
    ),
}
# Architecture as config.json names it -> the class that is loaded.
SUPPORTED = {
    architecture: loaded
    for family in FAMILIES.values()
    for architecture, loaded in family.classes.items()
}


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model answers with logits."""
    return "ForImageClassification" in type(model).__name__


def family_of(model: PreTrainedModel) -> Family:
    """The family of a loaded model."""
    return FAMILIES[tower(model).config.model_type]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a model's image tower, first to last."""
    layers: nn.ModuleList = tower(model).get_submodule(family_of(model).blocks)
    return layers


def keep_blocks(model: PreTrainedModel, depth: int) -> None:
    """Let a model's image tower end after its first blocks."""
    base, path = tower(model), family_of(model).blocks
    base.set_submodule(path, blocks(model)[:depth])
    base.config.num_hidden_layers = depth
