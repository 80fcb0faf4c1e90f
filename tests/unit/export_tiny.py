"""Tiny random models, saved as `save_pretrained` saves any model, for the export tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from rich.console import Console

from report.terminal import Bars
from tests import commands

QUIET = Bars(Console(quiet=True))
PATCH = 4
PX = 16
WIDTH = 16
LAYERS = 2

_COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": PX,
    "patch_size": PATCH,
    "num_labels": 3,
}
_CONFIGS = {
    "ViT": lambda **own: transformers.ViTConfig(intermediate_size=32, **{**_COMMON, **own}),
    "DeiT": lambda **own: transformers.DeiTConfig(intermediate_size=32, **{**_COMMON, **own}),
    "Dinov2": lambda **own: transformers.Dinov2Config(mlp_ratio=2, **{**_COMMON, **own}),
}


def run_export(*arguments: object) -> commands.Ran:
    """`python -m export ...`, here."""
    return commands.run("export", *arguments)


def save_tiny(
    folder: Path, class_name: str, processor: dict | None = None, **config: object
) -> Path:
    """Save a seeded random model whose every weight matters to its outputs.

    `config` are fields of its config.json that differ from the others'.
    """
    family = next(name for name in _CONFIGS if class_name.startswith(name))
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(_CONFIGS[family](**config))
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases and unit scales would hide a weight that went to the wrong place.
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def saved_library_model(folder: Path, class_name: str) -> torch.nn.Module:
    """Load a model with the library alone."""
    return getattr(transformers, class_name).from_pretrained(folder).eval()
