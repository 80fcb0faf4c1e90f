"""A head of texts for CLIP and SigLIP: the text tower runs once, here, and is not served.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision": the
logit of a label is a scaled cosine between the image's embedding and that of a sentence about the
label; SigLIP (Zhai et al. 2023) adds a bias. On embeddings of length 1 that is a linear layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPModel, PreTrainedModel, SiglipModel

from export.errors import UsageError, first_line
from export.families import family_of
from export.request import Texts

BATCH = 64  # sentences, whose attention is what takes memory
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


def text_head(
    network: PreTrainedModel, model: str, texts: Texts
) -> tuple[nn.Linear, dict[str, Any]]:
    """Embed a sentence about each label.

    Args:
        network: with its text tower.
        model: directory or hub id of the checkpoint, which has the tokenizer.
        texts: the labels.

    Returns:
        The linear layer from embeddings of length 1 (B, D) to what the library calls
        `logits_per_image` (B, C), and how it was made, ready for JSON.

    Raises:
        UsageError: the model has no text tower, or the checkpoint no tokenizer that fits it.
    """
    if not isinstance(network, CLIPModel | SiglipModel):
        raise UsageError(
            f"--labels needs a text tower, and {model} is a {type(network).__name__}; give a "
            "checkpoint whose config.json says CLIPModel or SiglipModel"
        )
    prompt = texts.prompt or str(family_of(network).prompt)
    sentences = [prompt.replace("{}", label) for label in texts.labels]
    inputs = _tokens(network, model, sentences)
    with torch.inference_mode():
        parts = [
            network.get_text_features(**dict(zip(inputs, rows, strict=True))).pooler_output
            for rows in zip(*(torch.split(ids, BATCH) for ids in inputs.values()), strict=True)
        ]
        features = torch.cat(parts)  # (C, D)
        features = features / features.norm(dim=-1, keepdim=True)
        scale = network.logit_scale.exp()
        weight = features * scale
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    bias = network.logit_bias.item() if isinstance(network, SiglipModel) else 0.0
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.fill_(bias)
    record = {
        "kind": "zero-shot",
        "labels": list(texts.labels),
        "prompt": prompt,
        "scale": float(scale),
        "bias": bias,
    }
    return linear.eval(), record


def _tokens(
    network: CLIPModel | SiglipModel, model: str, sentences: list[str]
) -> dict[str, torch.Tensor]:
    folder = Path(model)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(
            f"--labels: {model} has no tokenizer (one of {', '.join(TOKENIZER_FILES)}); save it "
            "there with the tokenizer's save_pretrained"
        )
    text = network.config.text_config
    padding: dict[str, Any] = {"padding": True}
    if isinstance(network, SiglipModel):  # as it was trained
        padding = {"padding": "max_length", "max_length": text.max_position_embeddings}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        longest = max(sentences, key=lambda sentence: len(tokenizer(sentence)["input_ids"]))
        words = len(tokenizer(longest)["input_ids"])
        if words <= text.max_position_embeddings:
            found = dict(tokenizer(sentences, return_tensors="pt", **padding))
    except Exception as error:  # the library raises many types on foreign files
        raise UsageError(
            f"--labels: the tokenizer of {model} cannot be used ({first_line(error)})"
        ) from error
    if words > text.max_position_embeddings:
        raise UsageError(
            f"--labels: a text is longer than the model's {text.max_position_embeddings} tokens, "
            f"such as {longest[:60]!r}; shorten it"
        )
    ids = found["input_ids"]
    if int(ids.max()) >= text.vocab_size:
        raise UsageError(
            f"--labels: the tokenizer of {model} is of another model, it has more words than the "
            f"{text.vocab_size} of its config.json"
        )
    if len({tuple(row) for row in ids.tolist()}) < len(sentences):
        raise UsageError(
            f"--labels: the tokenizer of {model} does not tell two labels apart; write them in "
            "other words"
        )
    known = ("input_ids", "attention_mask")
    return {name: found[name] for name in known if name in found}
