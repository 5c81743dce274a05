"""How fast: each function of this package is one map, computed by the fastest path that fits, beside its plain reference."""

from kanformer.ops.backend import use_backend
from kanformer.ops.edge_functions import edge_functions
from kanformer.ops.full_edges import full_edges
from kanformer.ops.kan_linear import kan_linear
from kanformer.ops.reference import reference_edge_functions, reference_full_edges

__all__ = ["edge_functions", "full_edges", "kan_linear", "reference_edge_functions", "reference_full_edges", "use_backend"]
