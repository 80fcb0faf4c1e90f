"""Measure a served adaptive ViT with perf_analyzer."""
