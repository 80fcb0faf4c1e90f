"""Measure a served adaptive ViT beside what a user would run instead, and price its graphs."""
