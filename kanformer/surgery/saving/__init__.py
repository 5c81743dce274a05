"""Patched models on disk: loading by stock transformers, checks, cards, deltas, the hub."""
