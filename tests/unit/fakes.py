"""Hand-written fakes: an artifact, and rungs that count their calls."""

import numpy as np

from imaging import code_sha256
from routing import Calibration, RungError, RungOutputs, RungRecord, ScoreMap

D, LAYERS, CLASSES = 4, 3, 5


def make_calibration(threshold=0.5, classes=CLASSES, **changes):
    """Score = the first pixel of an image, through `cls_path` of `FakeRung`'s layers."""
    fields = {
        "backbone": "fake",
        "rungs": {
            "vit_low": RungRecord(2, "px=2", "0" * 64),
            "vit_high": RungRecord(4, "px=4", "1" * 64),
        },
        "image_shape": (3, 4, 4),
        "preprocessing_sha256": "2" * 64,
        "imaging_sha256": code_sha256(),
        "embedding_dim": D,
        "layers": LAYERS,
        "classes": classes,
        "signal": "cls_path",
        "score_map": ScoreMap(1, (0.0, 1.0), (0.0, 1.0)),
        "threshold": threshold,
        "chosen_by": {"threshold": 0.0 if threshold is None else threshold},
    }
    return Calibration(**{**fields, **changes})


def images(*scores):
    """Images that `FakeRung` gives these scores."""
    batch = np.zeros((len(scores), 3, 4, 4), np.float32)
    batch[:, 0, 0, 0] = scores
    return batch


class FakeRung:
    """Records the batches it is called with; marks its answers with `tag`."""

    def __init__(self, tag, classes=CLASSES, fail=False):
        self.tag, self.classes, self.fail = tag, classes, fail
        self.batches = []

    def __call__(self, image):
        self.batches.append(image)
        if self.fail:
            raise RungError(f"{self.tag} is down")
        first_pixel = image[:, 0, 0, 0]
        embedding = np.stack([np.full(D, self.tag, np.float32) + p for p in first_pixel])
        layers = np.zeros((len(image), LAYERS + 1, D), np.float32)
        layers[:, :, 0] = first_pixel[:, None] * np.arange(LAYERS + 1)  # steps of |first pixel|
        logits = None
        if self.classes is not None:
            logits = np.zeros((len(image), self.classes), np.float32) + self.tag
        return RungOutputs(embedding, layers, logits)
