"""How far a student's answers are from the full model's: what training makes small.

The embedding is matched in direction (1 - cosine) and in size (smooth L1), and, where there is a
head, its softened answers are (Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural
network"), so that what counts most is what the head can see; so are the patch tokens, see
`patches`. The CLS tokens of the blocks in between may be matched, too. Not done: the contrast with
other images' answers of Tian, Krishnan and Isola 2020, "Contrastive representation distillation",
which needs large batches. Learning from the answers at a higher resolution is the consistency loss
of Tian et al. 2023, "ResFormer: Scaling ViTs with multi-resolution training", with the full model
held fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from .patches import pooled
from .teacher import Batch

TEMPERATURE = 2.0


@dataclass(frozen=True)
class Objective:
    """A sum of distances.

    Attributes:
        task: what logits mean, see `routing.TASKS`; None: there are none.
        logits: weight of the head's answers.
        layers: weight of the CLS tokens after the blocks; 0 leaves them out.
        patches: weight of the patch tokens.
    """

    task: str | None
    logits: float = 1.0
    layers: float = 0.0
    patches: float = 1.0

    def __call__(
        self,
        answers: Sequence[torch.Tensor],
        truth: Batch,
        patches: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean distance of B images, a scalar.

        Args:
            answers: embedding (B, D), cls_layers (B, K + 1, W)[, logits (B, C)], of K of the L
                blocks.
            truth: what the full model answers.
            patches: the student's patch tokens, (B, S, S, W); None: they do not count.
        """
        embedding, cls_layers, *logits = (answer.float() for answer in answers)
        cosine = functional.cosine_similarity(embedding, truth.embedding)
        distance = (1 - cosine).mean() + functional.smooth_l1_loss(embedding, truth.embedding)
        if logits and truth.logits is not None and self.logits:
            distance = distance + self.logits * self._of_logits(logits[0], truth.logits)
        if self.layers:
            blocks = truth.cls_layers[:, 1 : cls_layers.shape[1]]
            cosines = functional.cosine_similarity(cls_layers[:, 1:], blocks, dim=2)
            distance = distance + self.layers * (1 - cosines).mean()
        if patches is not None and self.patches:
            wanted = pooled(truth.patches, patches.shape[1])
            cosines = functional.cosine_similarity(patches, wanted, dim=3)
            apart = (1 - cosines).mean() + functional.smooth_l1_loss(patches, wanted)
            distance = distance + self.patches * apart
        return distance

    def _of_logits(self, found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        if self.task == "value":
            return functional.smooth_l1_loss(found, truth)
        found, truth = found / TEMPERATURE, truth / TEMPERATURE
        if self.task == "labels":
            return functional.binary_cross_entropy_with_logits(found, truth.sigmoid())
        return functional.kl_div(
            found.log_softmax(dim=1),
            truth.log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        )
