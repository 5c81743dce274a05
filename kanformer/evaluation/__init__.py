"""How much of a model its patched blocks keep: losses, divergence from the original, ablations, explained variance, speed."""
