"""Measure a served adaptive ViT with perf_analyzer, and what its calibration costs."""
