"""Data, loop, distillation, fine-tuning and checkpoints on accelerate: the only place that imports accelerate and datasets."""
