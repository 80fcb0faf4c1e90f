"""A-ViT's forward in NumPy, FP64, one image at a time, from the equations: removed and masked.

Yin et al. 2022, "A-ViT: Adaptive Tokens for Efficient Vision Transformer", and facts about its
public code, which masks.
"""

from __future__ import annotations

import math

import numpy as np
from transformers import ViTForImageClassification

EPSILON = 0.01
Arrays = dict[str, np.ndarray]


class _Vit:
    """The plain parts of a ViT with a head, by the names of its weights."""

    def __init__(self, model: ViTForImageClassification) -> None:
        self.weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
        config = model.config
        self.heads, self.eps = config.num_attention_heads, config.layer_norm_eps
        self.patch, self.blocks = config.patch_size, config.num_hidden_layers

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.eps)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def tokens(self, image: np.ndarray) -> np.ndarray:
        """[CLS; patches] + positions, (N, W)."""
        side, to = image.shape[1] // self.patch, "vit.embeddings."
        cut = image.reshape(3, side, self.patch, side, self.patch).transpose(1, 3, 0, 2, 4)
        kernel = self.weights[f"{to}patch_embeddings.projection.weight"]
        patches = cut.reshape(side * side, -1) @ kernel.reshape(len(kernel), -1).T
        patches += self.weights[f"{to}patch_embeddings.projection.bias"]
        tokens = np.concatenate([self.weights[f"{to}cls_token"][0], patches])
        return tokens + self.weights[f"{to}position_embeddings"][0]

    def block(self, t: np.ndarray, index: int, mask: np.ndarray) -> np.ndarray:
        """All tokens through a block; those that `mask` (N,) has as 0 are no keys."""
        name = f"vit.layers.{index}."
        normed = self.norm(t, f"{name}layernorm_before") * mask[:, None]
        q, k, v = (
            self.linear(normed, f"{name}attention.{letter}_proj")
            .reshape(len(t), self.heads, -1)
            .transpose(1, 0, 2)
            for letter in "qkv"
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[2]) - 1000 * (1 - mask)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        attended = (weights @ v).transpose(1, 0, 2).reshape(len(t), -1)
        t = t + self.linear(attended, f"{name}attention.o_proj")
        hidden = self.norm(t, f"{name}layernorm_after") * mask[:, None]
        hidden = self.linear(hidden, f"{name}mlp.fc1")
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        return t + self.linear(hidden, f"{name}mlp.fc2")

    def answers(self, layers: list[np.ndarray]) -> Arrays:
        embedding = self.norm(layers[-1], "vit.layernorm")
        logits = self.linear(embedding, "classifier")
        return {"embedding": embedding, "cls_layers": np.stack(layers), "logits": logits}


def _gated(t: np.ndarray, gate: tuple[float, float]) -> np.ndarray:
    return 1 / (1 + np.exp(gate[1] - gate[0] * t[:, 0]))


def _of_all(one, model, gate, images) -> Arrays:
    found = [one(_Vit(model), gate, image.astype(np.float64)) for image in images]
    return {name: np.stack([answer[name] for answer in found]) for name in found[0]}


def removing(model, gate: tuple[float, float], images: np.ndarray) -> Arrays:
    """What halts is gone, and an image whose class token halts is done.

    Returns:
        The outputs of a rung: `tokens`, how many ran through each block, and `patches`, the blocks
        that each patch ran through, among them.
    """
    return _of_all(_removing, model, gate, images)


def _removing(vit: _Vit, gate: tuple[float, float], image: np.ndarray) -> Arrays:
    t = vit.tokens(image)
    place, c, depth = np.arange(len(t)), np.zeros(len(t)), np.zeros(len(t), int)
    left, mixture, layers, alive, done = 1.0, 0.0, [t[0]], [], False
    for index in range(vit.blocks):
        if done:
            alive.append(0)
            layers.append(layers[-1])
            continue
        alive.append(len(t))
        t = vit.block(t, index, np.ones(len(t)))
        h = _gated(t, gate) if index < vit.blocks - 1 else np.ones(len(t))
        c[place] += h
        depth[place] += 1
        layers.append(mixture + left * t[0])
        done = c[0] > 1 - EPSILON
        mixture, left = mixture + h[0] * t[0], left - h[0]
        kept = c[place] <= 1 - EPSILON
        t, place = t[kept], place[kept]
    return {**vit.answers(layers), "tokens": np.array(alive), "patches": depth[1:]}


def masking(model, gate: tuple[float, float], images: np.ndarray) -> Arrays:
    """As the public code: all tokens are computed, and what has halted is masked.

    Returns:
        The outputs of a rung, and `counted`, the blocks that each patch ran through there, where
        tokens go on after the class token has halted.
    """
    return _of_all(_masking, model, gate, images)


def _masking(vit: _Vit, gate: tuple[float, float], image: np.ndarray) -> Arrays:
    t = vit.tokens(image)
    c, left, mask = np.zeros(len(t)), np.ones(len(t)), np.ones(len(t))
    counter, mixture, layers = np.ones(len(t)), np.zeros_like(t), [t[0]]
    for index in range(vit.blocks):
        t = vit.block(t * mask[:, None], index, mask)
        h = _gated(t, gate) if index < vit.blocks - 1 else np.ones(len(t))
        c = c + h
        ends, goes_on = (c > 1 - EPSILON) * mask, c < 1 - EPSILON
        layers.append((mixture + (left * mask)[:, None] * t)[0])
        if not mask[0]:
            layers[-1] = layers[-2]
        mixture = mixture + (left * ends)[:, None] * t + (h * goes_on)[:, None] * t
        left, counter = left - h * goes_on, counter + goes_on
        mask = goes_on.astype(float)
    # The answer is the mixture, whatever came of the single layers.
    found = vit.answers([*layers[:-1], mixture[0]])
    return {**found, "counted": counter[1:]}
