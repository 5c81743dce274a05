"""Which feed-forward blocks a model has: how each family writes its own, read, checked by running, described."""
