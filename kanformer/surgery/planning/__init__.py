"""What patching would do: the blocks that each config selects, and the reasons against the others."""
