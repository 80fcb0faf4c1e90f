"""Checkpoints of small random ViTs under timm's key names, and what such a ViT answers, by hand."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch.nn import functional

WIDTH, HEADS, DEPTH, HIDDEN, PATCH, PX, CLASSES = 192, 3, 2, 384, 4, 16, 5
GRID = PX // PATCH
NAME = "vit_tiny_patch4_16"


def checkpoint(
    *,
    scales: bool = False,
    registers: int = 0,
    distilled: bool = False,
    positions: int | None = None,
    head: bool = True,
    bias: bool = True,
) -> dict[str, torch.Tensor]:
    """Random weights of a small ViT, named as timm names them.

    `positions` is how many special tokens the table of positions holds, all by default.
    """
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int, std: float = 0.1, around: float = 0.0) -> torch.Tensor:
        return around + std * torch.randn(*shape, generator=generator)

    special = 1 + distilled + registers
    tensors = {
        "cls_token": some(1, 1, WIDTH),
        "pos_embed": some(1, (special if positions is None else positions) + GRID**2, WIDTH),
        "patch_embed.proj.weight": some(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": some(WIDTH),
        "norm.weight": some(WIDTH, around=1),
        "norm.bias": some(WIDTH),
    }
    if distilled:
        tensors["dist_token"] = some(1, 1, WIDTH)
    if registers:
        tensors["reg_token"] = some(1, registers, WIDTH)
    for head_name in ["head", "head_dist"][: head * (1 + distilled)]:
        tensors[f"{head_name}.weight"] = some(CLASSES, WIDTH)
        tensors[f"{head_name}.bias"] = some(CLASSES)
    for index in range(DEPTH):
        block = f"blocks.{index}."
        for norm in ("norm1", "norm2"):
            tensors[f"{block}{norm}.weight"] = some(WIDTH, around=1)
            tensors[f"{block}{norm}.bias"] = some(WIDTH)
        for linear, (outs, ins) in {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (HIDDEN, WIDTH),
            "mlp.fc2": (WIDTH, HIDDEN),
        }.items():
            tensors[f"{block}{linear}.weight"] = some(outs, ins)
            if bias or linear != "attn.qkv":
                tensors[f"{block}{linear}.bias"] = some(outs)
        if scales:
            tensors[f"{block}ls1.gamma"] = some(WIDTH, std=0.3)
            tensors[f"{block}ls2.gamma"] = some(WIDTH, std=0.3)
    return tensors


def answers(tensors: dict[str, torch.Tensor], image: torch.Tensor) -> dict[str, torch.Tensor]:
    """What such a ViT answers: pre-norm blocks, exact GELU, every LayerNorm with eps 1e-6.

    Two heads are averaged. Positions are added to all tokens where the table has one for each, and
    to the patches alone where it has only theirs.
    """

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return functional.layer_norm(x, (WIDTH,), weight, bias, 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", torch.zeros(1))

    patches = functional.conv2d(
        image, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=PATCH
    )
    patches = patches.flatten(2).transpose(1, 2)  # (B, N, D)
    names = [name for name in ("cls_token", "dist_token", "reg_token") if name in tensors]
    special = torch.cat([tensors[name] for name in names], dim=1).expand(len(image), -1, -1)
    if tensors["pos_embed"].shape[1] == patches.shape[1]:
        x = torch.cat([special, patches + tensors["pos_embed"]], dim=1)
    else:
        x = torch.cat([special, patches], dim=1) + tensors["pos_embed"]
    layers = [x[:, 0]]
    for index in range(DEPTH):
        block = f"blocks.{index}."
        query, key, value = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in linear(norm(x, f"{block}norm1"), f"{block}attn.qkv").chunk(3, dim=2)
        )  # each (B, heads, N, D / heads)
        weights = (query @ key.transpose(2, 3) / (WIDTH / HEADS) ** 0.5).softmax(dim=3)
        attended = linear((weights @ value).transpose(1, 2).flatten(2), f"{block}attn.proj")
        x = x + attended * tensors.get(f"{block}ls1.gamma", torch.ones(1))
        inner = linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1")
        inner = linear(0.5 * inner * (1 + torch.erf(inner / 2**0.5)), f"{block}mlp.fc2")
        x = x + inner * tensors.get(f"{block}ls2.gamma", torch.ones(1))
        layers.append(x[:, 0])
    x = norm(x, "norm")
    found = {"embedding": x[:, 0], "cls_layers": torch.stack(layers, dim=1)}
    if "head_dist.weight" in tensors:
        found["logits"] = (linear(x[:, 0], "head") + linear(x[:, 1], "head_dist")) / 2
    elif "head.weight" in tensors:
        found["logits"] = linear(x[:, 0], "head")
    return found


def save(folder: Path, tensors: dict[str, torch.Tensor], name: str = "weights.safetensors") -> Path:
    """Write weights to a file of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / name)
    return folder / name
