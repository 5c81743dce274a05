"""Blocks that no description fits, found by following values through one forward of the model."""
