"""`static-vit`: a plain ViT-Tiny of Tiny-ImageNet shape, for trying the pipeline without weights.

Patch 4 gives 16 x 16 patches at 64 px and 8 x 8 at 32 px. With patch 8 the low rung would have
16 patches and cost as much as the high one at batch 1 (fixed costs dominate), leaving nothing to
gain from escalating selectively; with patch 4 it is 2.6 times cheaper at batch 1 on a CPU and 4.6
times at batch 16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from bundle import manifest
from export.backbones import Backbone
from export.errors import UsageError, first_line
from imaging import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The library's initialiser (std 0.02) leaves nearly the same output for every image: its CLS
# embeddings at the two resolutions have a cosine of 0.99, so no image would ever be worth
# escalating. Weights of std 1.5 / sqrt(fan-in) bring that to 0.90, differently for each image.
INIT_GAIN = 1.5


def static_vit(seed: int = 0, checkpoint: Path | None = None) -> Backbone:
    """Build `static-vit`, seeded or from a checkpoint.

    Args:
        seed: of the initial weights, where no checkpoint is given.
        checkpoint: a state dict of `ViTForImageClassification` in this configuration, as
            safetensors or as torch writes it.

    Raises:
        UsageError: the checkpoint is missing, unreadable or of another shape.
    """
    config = ViTConfig(
        image_size=64,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=200,
        attn_implementation="eager",
    )
    if checkpoint is None:
        model = _seeded(config, seed)
        source: dict[str, Any] = {"kind": "seed", "seed": seed, "init_gain": INIT_GAIN}
    else:
        model = _from_checkpoint(config, checkpoint)
        sha256 = manifest.sha256_file(checkpoint)
        source = {"kind": "checkpoint", "file": checkpoint.name, "sha256": sha256}
    return Backbone(
        name="static-vit",
        source=source,
        model=model.eval(),
        labels=None,
        default_px=(32, 64),
        preprocessing=lambda px: Preprocessing(
            height=px,
            width=px,
            resize_shortest_edge=px,
            resample="bicubic",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        ),
    )


def _seeded(config: ViTConfig, seed: int) -> PreTrainedModel:
    model = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(seed)
    tables = ("cls_token", "position_embeddings")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(tables):
                parameter.normal_(std=config.initializer_range, generator=generator)
            elif parameter.ndim > 1:  # Linear (out, in) and Conv (out, in, h, w)
                fan_in = parameter[0].numel()
                parameter.normal_(std=INIT_GAIN / fan_in**0.5, generator=generator)
    return model


def _from_checkpoint(config: ViTConfig, checkpoint: Path) -> PreTrainedModel:
    state = _read_state(checkpoint)
    try:
        model, info = ViTForImageClassification.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{checkpoint.name} does not fit static-vit ({first_line(error)}); "
            "it must hold a ViTForImageClassification of width 192, 12 layers, patch 4, 200 classes"
        ) from error
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            keys = sorted(info[problem])
            raise UsageError(
                f"{checkpoint.name} does not fit static-vit: {len(keys)} "
                f"{problem.replace('_', ' ')}, such as {keys[0]}"
            )
    return model


def _read_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    if not checkpoint.is_file():
        raise UsageError(f"--checkpoint {checkpoint}: no such file")
    try:
        if checkpoint.suffix == ".safetensors":
            return load_file(checkpoint)
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types on foreign files
        raise UsageError(
            f"--checkpoint {checkpoint} is neither safetensors (*.safetensors) nor a state dict "
            "that torch.load reads with weights_only=True"
        ) from error
    for wrapper in ("state_dict", "model"):  # how training scripts usually wrap it
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UsageError(f"--checkpoint {checkpoint} holds no state dict (name -> tensor)")
    return state
