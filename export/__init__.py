"""Export: torch backbone to ONNX rungs, and the assembled Triton model repository."""
