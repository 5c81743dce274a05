"""The same small causal language model from scratch with different feed-forward blocks, compared at equal parameters, FLOPs and time."""
