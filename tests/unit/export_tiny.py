"""Tiny random models, saved as `save_pretrained` saves any model, for the export tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors

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
_MLP = {"intermediate_size": 32}
_TEXT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    **_MLP,
}
WORDS = ("a", "photo", "of", "This", "is", "cat", "dog", "emu", "grey", ".")
START, END = 62, 63  # of a text
PROJECTION = 12  # of CLIP; SigLIP has none


def _plain(kind: str, **more: object):
    """A configuration that is of images alone."""
    return lambda own, name: getattr(transformers, kind)(**{**_COMMON, **more, **own})


def _clip(own: dict, name: str) -> transformers.PretrainedConfig:
    vision = {**_COMMON, **_MLP, **own}
    if name.startswith("CLIPVision"):
        return transformers.CLIPVisionConfig(**vision, projection_dim=PROJECTION)
    return transformers.CLIPConfig(
        vision_config=vision,
        text_config={**_TEXT, "eos_token_id": END},
        projection_dim=PROJECTION,
        num_labels=3,
    )


def _siglip(own: dict, name: str) -> transformers.PretrainedConfig:
    vision = {**_COMMON, **_MLP, **own}
    if name.startswith("SiglipVision"):
        return transformers.SiglipVisionConfig(**vision)
    text = {**_TEXT, "projection_size": WIDTH}
    return transformers.SiglipConfig(vision_config=vision, text_config=text, num_labels=3)


# The longer of two names that begin alike comes first.
_CONFIGS = {
    "ViTMAE": _plain(
        "ViTMAEConfig",
        **_MLP,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
    ),
    "ViTMSN": _plain("ViTMSNConfig", **_MLP),
    "ViT": _plain("ViTConfig", **_MLP),
    "DeiT": _plain("DeiTConfig", **_MLP),
    "Dinov2WithRegisters": _plain("Dinov2WithRegistersConfig", mlp_ratio=2, num_register_tokens=3),
    "Dinov2": _plain("Dinov2Config", mlp_ratio=2),
    "DINOv3ViT": _plain("DINOv3ViTConfig", **_MLP, num_register_tokens=2),
    "Beit": _plain("BeitConfig", **_MLP, use_relative_position_bias=True, vocab_size=11),
    "Data2VecVision": _plain("Data2VecVisionConfig", **_MLP, use_relative_position_bias=True),
    "CLIP": _clip,
    "Siglip": _siglip,
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
    model = getattr(transformers, class_name)(_CONFIGS[family](config, class_name))
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases and unit scales would hide a weight that went to the wrong place.
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_tokenizer(folder: Path, words: tuple[str, ...] = WORDS) -> Path:
    """Write a tokenizer of these words, with a sign at the start and the end of a text."""
    known = {"[UNK]": 0, "[PAD]": 1, **{word: i for i, word in enumerate(words, 2)}}
    known |= {"[START]": START, "[END]": END}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", START), ("[END]", END)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]"
    ).save_pretrained(folder)
    return folder


def saved_library_model(folder: Path, class_name: str) -> torch.nn.Module:
    """Load a model with the library alone."""
    return getattr(transformers, class_name).from_pretrained(folder).eval()
