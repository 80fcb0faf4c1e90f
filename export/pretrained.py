"""Any ViT, DeiT or DINOv2 that `transformers` loads, from a local directory or a hub id."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from bundle import manifest
from export.backbones import Backbone
from export.errors import UsageError, first_line
from export.processor import Processor
from export.vit_families import base_model, has_own_head

# Architecture as config.json names it -> (class that is loaded, options). A masked-image model's
# decoder is of no use here, so its base model is loaded.
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("ViTModel", {"add_pooling_layer": False}),
    "ViTForMaskedImageModeling": ("ViTModel", {"add_pooling_layer": False}),
    "ViTForImageClassification": ("ViTForImageClassification", {}),
    "DeiTModel": ("DeiTModel", {"add_pooling_layer": False}),
    "DeiTForMaskedImageModeling": ("DeiTModel", {"add_pooling_layer": False}),
    "DeiTForImageClassification": ("DeiTForImageClassification", {}),
    "DeiTForImageClassificationWithTeacher": ("DeiTForImageClassificationWithTeacher", {}),
    "Dinov2Model": ("Dinov2Model", {}),
    "Dinov2Backbone": ("Dinov2Model", {}),
    "Dinov2ForImageClassification": ("Dinov2ForImageClassification", {}),
}
BASE_MODELS = {"vit": "ViTModel", "deit": "DeiTModel", "dinov2": "Dinov2Model"}
# `problem_type` of config.json -> one of `routing.TASKS`.
PROBLEM_TYPES = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "value",
}
_CHOICES = "give static-vit, dinov2-small, a folder that save_pretrained wrote, or a hub id (a/b)"
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def pretrained(model: str) -> Backbone:
    """Load a backbone by directory or hub id.

    Args:
        model: a directory that `save_pretrained` wrote, or a hub id such as
            `facebook/deit-tiny-patch16-224`.

    Raises:
        UsageError: it cannot be loaded, is no supported architecture, lacks weights, or its
            preprocessing cannot be carried out by `imaging`.
    """
    config = _load_config(model)
    _check_config(config, model)
    network = _load_network(config, model)
    processor = Processor.load(model, config)
    native_px = processor.native_px
    patch = int(config.patch_size)
    high_px = max(2 * patch, native_px // patch * patch)
    low_px = max(patch, round(high_px / 2 / patch) * patch)
    return Backbone(
        name=Path(model).resolve().name if Path(model).is_dir() else model,
        source=_source(model, config),
        model=network,
        labels=_labels(config) if has_own_head(network) else None,
        default_px=(low_px, high_px),
        preprocessing=processor.preprocessing,
        own_task=PROBLEM_TYPES.get(config.problem_type),
        notices=processor.notices,
    )


def _load_config(model: str) -> PretrainedConfig:
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is not None
    if not Path(model).is_dir() and not is_hub_id:
        raise UsageError(f"--model {model} is no directory; {_CHOICES}")
    # Its retries would be a line of stderr each; the error below says what came of them.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # the hub client, JSON and transformers raise unrelated types
        raise UsageError(
            f"--model {model} cannot be loaded ({first_line(error).rstrip('.')}); {_CHOICES}"
        ) from error


def _check_config(config: PretrainedConfig, model: str) -> None:
    architecture = _architecture(config)
    if architecture not in SUPPORTED:
        raise UsageError(
            f"--model {model} is a {architecture}; supported are {', '.join(SUPPORTED)}"
        )
    for field in ("patch_size", "image_size"):
        value = getattr(config, field)
        if not isinstance(value, int):
            raise UsageError(f"--model {model} has {field} {value}; only square ones are supported")
    if config.num_channels != 3:
        raise UsageError(f"--model {model} takes {config.num_channels} channels, not RGB")


def _architecture(config: PretrainedConfig) -> str:
    names = config.architectures or []
    return str(names[0] if names else BASE_MODELS.get(config.model_type, config.model_type))


def _load_network(config: PretrainedConfig, model: str) -> PreTrainedModel:
    class_name, options = SUPPORTED[_architecture(config)]
    try:
        network, info = getattr(transformers, class_name).from_pretrained(
            model,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # as above
        raise UsageError(
            f"--model {model}: its weights cannot be loaded ({first_line(error)}); "
            "save it anew with save_pretrained"
        ) from error
    # A mask token serves pretraining only. Surplus weights (a pooler, a decoder) do no harm.
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("mask_token"))
    if missing:
        raise UsageError(
            f"--model {model} lacks {len(missing)} weights that {class_name} needs, such as "
            f"{missing[0]}; they would be random. Save it anew with save_pretrained"
        )
    if has_own_head(network) and config.num_labels < 1:
        network = base_model(network)
    return network.eval()


def _labels(config: PretrainedConfig) -> tuple[str, ...]:
    labels = config.id2label or {}
    names = (labels.get(index, f"LABEL_{index}") for index in range(config.num_labels))
    # One label per line in labels.txt.
    return tuple(" ".join(str(name).split()) for name in names)


def _source(model: str, config: PretrainedConfig) -> dict[str, Any]:
    folder = Path(model)
    if not folder.is_dir():
        return {"kind": "hub", "id": model, "revision": getattr(config, "_commit_hash", None)}
    files = sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))
    return {
        "kind": "directory",
        "name": folder.resolve().name,
        "files": {file.name: manifest.sha256_file(file) for file in files},
    }
