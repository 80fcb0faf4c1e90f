"""`adapted=DIR`: weights of the graph's own, trained without labels to answer as the full model.

`adaptation` trains the module here and writes its weights, `bundle.adapted` says where they lie.
Besides the transformer's weights there is an alignment as `bundle.alignment` has it, which training
begins from: it makes the embedding of the last CLS tokens, and a linear head follows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from bundle.adapted import Adapted, AdaptedError
from bundle.alignment import LAYERS
from export.families import tower

_TOWER = "tower."
_ALIGNMENT = "alignment."
_OWN = "own."


class AdaptedRung(nn.Module):
    """A rung, and what its weights are trained as.

    Args:
        rung: `image` to embedding (B, D), cls_layers (B, L+1, W)[, logits (B, C)] and perhaps
            counts of tokens, as its attribute `counts` says. What it has as `own` is learned or
            chosen here, too.
        model: whose weights it runs.
        widths: D and W.
        layers: L.
        aligns: whether logits, where there are any, follow from the embedding alone.
        head: what makes them of it; None: nothing does.
    """

    def __init__(
        self,
        rung: nn.Module,
        model: PreTrainedModel,
        widths: tuple[int, int],
        layers: int,
        aligns: bool,
        head: nn.Linear | None,
    ) -> None:
        super().__init__()
        self.rung = rung
        self.model = model
        self.head = head
        self.own: nn.Module | None = getattr(rung, "own", None)
        self.counts = int(getattr(rung, "counts", 0))
        self.layers = min(LAYERS, layers)
        self.alignment: nn.Linear | None = None
        if aligns:
            self.alignment = nn.Linear(widths[0] + self.layers * widths[1], widths[0])
            nn.init.zeros_(self.alignment.weight)
            nn.init.zeros_(self.alignment.bias)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the rung; shapes are those of the rung."""
        embedding, cls_layers, *rest = self.rung(image)
        logits, counts = rest[: len(rest) - self.counts], rest[len(rest) - self.counts :]
        if self.alignment is not None:
            embedding = embedding + self.alignment(self.tokens(embedding, cls_layers))
            logits = [self.head(embedding)] if self.head is not None else []
        return embedding, cls_layers, *logits, *counts

    def answers(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the rung; what it counts is left out."""
        found = self(image)
        return tuple(found[: len(found) - self.counts])

    def tokens(self, embedding: torch.Tensor, cls_layers: torch.Tensor) -> torch.Tensor:
        """What an alignment reads, (B, F), as `bundle.alignment.tokens`."""
        earlier = cls_layers[:, -1 - self.layers : -1].flatten(1)
        return torch.cat([embedding, earlier], dim=1)

    @property
    def tower(self) -> nn.Module:
        """The transformer without a head: what is trained, with `own` and the alignment."""
        found: nn.Module = tower(self.model)
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """What a state holds, by name."""
        found = {_TOWER + name: value for name, value in self.tower.state_dict().items()}
        for prefix, part in ((_OWN, self.own), (_ALIGNMENT, self.alignment)):
            if part is not None:
                found |= {prefix + name: value for name, value in part.state_dict().items()}
        return {name: value.detach().contiguous() for name, value in found.items()}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the weights that `weights` gave.

        Raises:
            ValueError: a weight is missing, left over or of another shape.
        """
        own = self.weights()
        if {name: value.shape for name, value in own.items()} != {
            name: value.shape for name, value in weights.items()
        }:
            odd = sorted(set(own) ^ set(weights)) or ["shapes"]
            raise ValueError(f"weights of another module ({len(odd)} differ, as {odd[0]})")
        self.tower.load_state_dict(_under(_TOWER, weights))
        for prefix, part in ((_OWN, self.own), (_ALIGNMENT, self.alignment)):
            if part is not None:
                part.load_state_dict(_under(prefix, weights))

    def adopt(self, state: Adapted) -> AdaptedRung:
        """Load a state from its file; returns this module.

        Raises:
            AdaptedError: the weights are of another module.
        """
        try:
            self.load(load_file(state.file))
        except ValueError as error:
            raise AdaptedError(
                f"{state.file}: {error}; run python -m adaptation distil again"
            ) from None
        return self


def _under(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): value for k, value in weights.items() if k.startswith(prefix)}


def sha256_of(module: nn.Module) -> str:
    """Hex SHA-256 over a module's weights, their names and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
