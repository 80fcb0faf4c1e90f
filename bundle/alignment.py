"""Alignment: a linear map from a cheap rung's last CLS tokens to the full model's embedding.

A cheap rung's embedding is not only noisier than the full one, it is shifted; the map takes the
shift back. `calibration align` fits it on images that both have seen, without labels, and `export`
bakes it into the cheap graph before the head.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from routing import RungOutputs

LAYERS = 3  # CLS tokens before the last block's that the map reads besides the embedding


class AlignmentError(ValueError):
    """The alignment cannot be read. One line that says what to do."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """A fitted map, and what it was fitted on.

    Attributes:
        weights: FP32 (F, D), F as `tokens` gives them.
        bias: FP32 (D,).
        graph: fingerprint of the cheap graph, `RungRecord.fingerprint`.
        reference: fingerprint of the full model's graph.
        recipe: of the cheap graph.
        image_prints: of the n images it was fitted on, as `bundle.prints.encode`.
        image_hashes: `imaging.pixels_sha256` of each of them, (n,).
        cross_fitted: FP32 (n, D), the embedding that each of them gets by a map that was fitted
            without it and without the images of its group: what the aligned graph is worth on
            images that it has not learned is said by these.
        layer_dim: W, width of the CLS tokens; None: D.
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    graph: str
    reference: str
    recipe: str
    image_prints: str
    image_hashes: NDArray[np.str_]
    cross_fitted: NDArray[np.float32]
    layer_dim: int | None = None

    @property
    def layers(self) -> int:
        """How many CLS tokens it reads besides the embedding."""
        return (len(self.weights) - len(self.bias)) // (self.layer_dim or len(self.bias))

    def embedding(self, outputs: RungOutputs) -> NDArray[np.float32]:
        """The aligned embeddings of B images, FP32 (B, D)."""
        return tokens(outputs) @ self.weights + self.bias

    def save(self, path: Path) -> None:
        """Write the `.npz`, whole; other names of an earlier file keep what they named."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}")
        with fresh.open("wb") as file:
            fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
            np.savez(file, **{name: value for name, value in fields.items() if value is not None})
        os.replace(fresh, path)

    @classmethod
    def load(cls, path: Path) -> Alignment:
        """Read a `.npz`.

        Raises:
            AlignmentError: missing, or not written by `calibration align`.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays: dict[str, Any] = dict(file)
            layer_dim = int(arrays.pop("layer_dim")) if "layer_dim" in arrays else None
            names = [name for name in cls.__dataclass_fields__ if name != "layer_dim"]
            fields = {name: arrays[name] for name in names}
            texts = {name: str(value) for name, value in fields.items() if value.shape == ()}
            alignment = cls(**{**fields, **texts}, layer_dim=layer_dim)
            inputs, width = alignment.weights.shape
            if (inputs - width) % (layer_dim or width) or alignment.bias.shape != (width,):
                raise ValueError(f"weights of {inputs, width}, a bias of {alignment.bias.shape}")
            if alignment.cross_fitted.shape != (len(alignment.image_hashes), width):
                raise ValueError(f"cross-fitted embeddings of {alignment.cross_fitted.shape}")
            return alignment
        except FileNotFoundError:
            raise AlignmentError(f"no {path}; run python -m calibration align first") from None
        except (OSError, EOFError, ValueError, TypeError, KeyError, BadZipFile) as error:
            raise AlignmentError(f"{path} is not readable ({error}); align again") from None


def tokens(outputs: RungOutputs) -> NDArray[np.float32]:
    """What an alignment reads: the embedding and the CLS tokens of the last blocks but one.

    Returns:
        FP32 (B, F), F = D + K W with K = min(`LAYERS`, L), W the width of the CLS tokens.
    """
    if outputs.cls_layers is None:
        raise ValueError("an alignment reads cls_layers")
    layers = min(LAYERS, outputs.cls_layers.shape[1] - 1)
    earlier = outputs.cls_layers[:, -1 - layers : -1].reshape(len(outputs), -1)
    return np.concatenate([outputs.embedding, earlier], axis=1)
