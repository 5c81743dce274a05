"""Putting KAN-FFNs into the places of blocks, all or none, and taking them out again."""
