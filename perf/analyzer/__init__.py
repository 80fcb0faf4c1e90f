"""perf_analyzer: find or install it, give it real images, run one pass, read what it wrote."""

from .inputs import InputData, write_bytes, write_tensors
from .installation import Analyzer, PerfAnalyzerError, find_analyzer, install
from .parse import Figures, ParseError
from .passes import AnalyzerResult, Load, UnstableError, run

__all__ = [
    "Analyzer",
    "AnalyzerResult",
    "Figures",
    "InputData",
    "Load",
    "ParseError",
    "PerfAnalyzerError",
    "UnstableError",
    "find_analyzer",
    "install",
    "run",
    "write_bytes",
    "write_tensors",
]
