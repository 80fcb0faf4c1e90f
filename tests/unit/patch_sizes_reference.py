"""APT in NumPy, image by image, from the equations: entropies, choice, embedding and a plain ViT.

Choudhury et al. 2025, "Accelerating Vision Transformers with Adaptive Patch Sizes", and facts about
its public code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def bins(levels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Of the gray value of each pixel, (H, W), of a picture (3, H, W): 512 bins on 0 to 255."""
    red, green, blue = levels.astype(np.float32)
    gray = np.float32(0.2989) * red + np.float32(0.587) * green + np.float32(0.114) * blue
    scaled = gray * np.float32(512) / np.float32(255)
    return np.minimum(np.floor(scaled), 511).astype(np.int64)


def entropies(levels: NDArray[np.uint8], cell_px: int) -> Array:
    """Bits of each cell of a picture."""
    found, side = bins(levels), levels.shape[1] // cell_px
    shares = [
        np.bincount(cell.ravel(), minlength=512) / cell_px**2
        for row in np.split(found, side)
        for cell in np.split(row, side, axis=1)
    ]
    return np.array([-(p * np.log2(p + 1e-10)).sum() for p in shares]).reshape(side, side)


def choose(levels: NDArray[np.uint8], patch_px: int, bits: Sequence[float]) -> list[NDArray]:
    """Which cells are tokens, of each scale, the finest first; the coarsest choose first."""
    side = levels.shape[1] // patch_px
    take = [np.ones((side, side), dtype=bool)]
    for scale, most in enumerate(bits, start=1):
        take.append(entropies(levels, patch_px * 2**scale) < most)
    for big in range(len(bits), 0, -1):
        for small in range(big):
            times = 2 ** (big - small)
            take[small] &= ~take[big].repeat(times, axis=0).repeat(times, axis=1)
    return take


def embed(
    image: Array,
    take: Sequence[NDArray],
    weights: Mapping[str, Array],
) -> Array:
    """Patch tokens with their positions, (n, D), of a normalised image (3, H, W).

    Args:
        image: as the model sees it.
        take: what `choose` says.
        weights: `patches` (D, 3, P, P), `bias` (D,), `grid` (G, G, D), the positions of patches,
            and perhaps the public names of what is added to coarse cells.
    """
    kernel = weights["patches"]
    patch = kernel.shape[-1]

    def project(pixels: Array) -> Array:
        side = pixels.shape[1] // patch
        cut = pixels.reshape(3, side, patch, side, patch)
        return np.einsum("cyaxb,dcab->yxd", cut, kernel) + weights["bias"]

    fine, tokens = project(image), []
    for scale, chosen in enumerate(take):
        found, times = fine, 2**scale
        if scale:
            rows = image[:, times // 2 - 1 :: times] + image[:, times // 2 :: times]
            found = project(
                (rows[..., times // 2 - 1 :: times] + rows[..., times // 2 :: times]) / 4
            )
        if scale and "patch_attn.weight" in weights:
            detail = fine
            for _ in range(scale):
                half = len(detail) // 2
                cut = detail.reshape(half, 2, half, 2, -1)
                detail = np.einsum("yaxbd,edab->yxe", cut, weights["patch_attn.weight"])
                detail = detail + weights["patch_attn.bias"]
            found = found + detail @ weights["zero_conv.weight"].T + weights["zero_conv.bias"]
        grid = torch.from_numpy(weights["grid"]).permute(2, 0, 1)[None]
        table = torch.nn.functional.interpolate(
            grid, size=chosen.shape, mode="bicubic", antialias=True
        )
        tokens.append((found + table[0].permute(1, 2, 0).numpy())[chosen])
    return np.concatenate(tokens)


def answers(
    state: Mapping[str, Array], heads: int, levels: NDArray[np.uint8], image: Array, bits: tuple
) -> dict[str, Array]:
    """What a ViT under timm's names, perhaps in APT's own layout, answers for one image."""
    kernel, positions = state["patch_embed.proj.weight"], state["pos_embed"][0]
    side = math.isqrt(len(positions) - 1)
    weights = {key.removeprefix("mixed_patch."): value for key, value in state.items()}
    weights |= {"patches": kernel, "bias": state["patch_embed.proj.bias"]}
    weights["grid"] = positions[1:].reshape(side, side, -1)
    patches = embed(image, choose(levels, kernel.shape[-1], bits), weights)
    x = np.concatenate([weights["cls_token"][0] + positions[:1], patches])  # (N, D)
    layers = [x[0]]

    def norm(x: Array, name: str) -> Array:
        spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
        normed = (x - x.mean(axis=-1, keepdims=True)) / spread
        return normed * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Array, name: str) -> Array:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    depth = sum(key.endswith("attn.qkv.weight") for key in state)
    for block in (f"blocks.{index}." for index in range(depth)):
        fused = linear(norm(x, f"{block}norm1"), f"{block}attn.qkv")
        query, key, value = fused.reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
        likeness = np.exp(query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1]))
        attended = likeness / likeness.sum(axis=-1, keepdims=True) @ value  # (heads, N, K)
        x = x + linear(attended.transpose(1, 0, 2).reshape(len(x), -1), f"{block}attn.proj")
        inner = linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1")
        inner = inner * (1 + torch.erf(torch.from_numpy(inner / math.sqrt(2))).numpy()) / 2
        x = x + linear(inner, f"{block}mlp.fc2")
        layers.append(x[0])
    embedding = norm(x, "norm")[0]
    found = {"embedding": embedding, "cls_layers": np.stack(layers)}
    return {**found, "logits": linear(embedding, "head"), "tokens": np.array([len(x)])}
