"""The modules: `KANLinear` (full edges), `SharedKANLinear` (shared edges), `KANFeedForward` (what replaces an MLP), `KANExperts` (a mixture's)."""

from kanformer.layers.edge_functions import EdgeFunctions
from kanformer.layers.experts import KANExperts
from kanformer.layers.feed_forward import KANFeedForward
from kanformer.layers.kan_linear import KANLinear
from kanformer.layers.shared_kan_linear import SharedKANLinear

__all__ = ["EdgeFunctions", "KANExperts", "KANFeedForward", "KANLinear", "SharedKANLinear"]
