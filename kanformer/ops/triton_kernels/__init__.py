"""Optional Triton kernels for uniform B-splines and rational functions on GPUs.

Import this package only where it is used: it imports triton, 3.5 or newer, and raises ImportError where there is none. All functions take flat tensors
(tokens, channels) on one device, record no gradients, and give the same bits every time they are called with the same numbers.
"""

from kanformer.ops.triton_kernels.full_edges import full_gradients, full_values
from kanformer.ops.triton_kernels.launch import INTERPRETED, supports
from kanformer.ops.triton_kernels.shared_gradients import shared_gradients
from kanformer.ops.triton_kernels.shared_values import shared_values

__all__ = ["INTERPRETED", "supports", "shared_values", "shared_gradients", "full_values", "full_gradients"]
