"""The only place that knows transformers' model classes: finding feed-forward blocks, replacing, restoring, saving, comparing them."""
