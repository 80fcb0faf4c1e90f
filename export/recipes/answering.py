"""What a model makes of its last tokens, where a forward of our own has run its blocks."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    CLIPForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2ForImageClassification,
    Dinov2WithRegistersForImageClassification,
    PreTrainedModel,
)

from export.families import family_of, has_head, tower

# Their heads read the CLS token and the mean of the patch tokens.
_READ_BOTH = (Dinov2ForImageClassification, Dinov2WithRegistersForImageClassification)


class Answering(nn.Module):
    """Tokens after the last block to the embedding and, with a head, logits.

    Attributes:
        special: how many tokens stand before the patch tokens: CLS, DeiT's distillation token and
            registers.

    Args:
        model: with or without its head.
        probe: a linear head on the embedding, in place of the model's own.
        unit_length: whether embeddings are scaled to length 1.
    """

    def __init__(
        self, model: PreTrainedModel, probe: nn.Linear | None, unit_length: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.probe = probe
        self.unit_length = unit_length
        self.family = family_of(model)
        embeddings = tower(model).embeddings
        registers = getattr(embeddings, "register_tokens", None)
        self.special = 1 + hasattr(embeddings, "distillation_token")
        self.special += 0 if registers is None else registers.shape[1]

    def forward(
        self, hidden: torch.Tensor, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The model's own norm, projection and head.

        Args:
            hidden: FP32 (B, N, W), the special tokens first.
            sizes: FP32 (B, N, 1), how many patches each stands for; 0: it is padding.

        Returns:
            The embedding (B, D), and the logits (B, C) or nothing.
        """
        tokens = getattr(tower(self.model), self.family.norm)(hidden)
        embedding = self.family.projected(self.model, tokens[:, 0])
        embedding = nn.functional.normalize(embedding) if self.unit_length else embedding
        if self.probe is not None:
            return embedding, [self.probe(embedding)]
        if isinstance(self.model, CLIPForImageClassification):
            return embedding, [self.model.classifier(self._mean(hidden, sizes))]
        return embedding, self._logits(tokens, sizes)

    def _mean(self, tokens: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Of the patch tokens (B, N, D), each patch once: (B, D)."""
        patches, counts = tokens[:, self.special :], sizes[:, self.special :]
        return (patches * counts).sum(dim=1) / counts.sum(dim=1)

    def _logits(self, tokens: torch.Tensor, sizes: torch.Tensor) -> list[torch.Tensor]:
        """What the model's own head makes of the normalised tokens (B, N, D): (B, C), or none."""
        cls, model = tokens[:, 0], self.model
        if not has_head(model):
            return []
        if isinstance(model, DeiTForImageClassificationWithTeacher):
            distilled = model.distillation_classifier(tokens[:, 1])
            return [(model.cls_classifier(cls) + distilled) / 2]
        if isinstance(model, _READ_BOTH):
            cls = torch.cat([cls, self._mean(tokens, sizes)], dim=1)
        return [model.classifier(cls)]
