"""A stand-alone Kolmogorov-Arnold network, built of the layers that go into transformers."""

from kanformer.network.history import History
from kanformer.network.kan import KAN

__all__ = ["KAN", "History"]
