"""Image bytes to image tensor: the one implementation, online and offline.

Depends on numpy and Pillow only (Python 3.10+), because `export repository` copies this folder
into the `preprocess` model, where Triton's own Python runs it. Calibration and the linear probe
import the same code, so the tensor a rung was calibrated on is the tensor it is served. HEIC is
read where `pi-heif` is installed.

Import it relatively inside a deployed model (`from .imaging import ...`).
"""

from .decode import FORMATS, ImageError, Limits, decode
from .identity import code_sha256, pixels_sha256
from .preprocessing import Preprocessing, PreprocessingError

__all__ = [
    "FORMATS",
    "ImageError",
    "Limits",
    "Preprocessing",
    "PreprocessingError",
    "code_sha256",
    "decode",
    "pixels_sha256",
]
