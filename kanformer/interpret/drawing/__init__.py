"""Figures beside the grid of a layer's functions: an importance map, the health of all layers, one node, one input, and what changed between two models."""
