"""From an MLP's weights and statistics to a KAN-FFN. Knows tensors and modules, not transformers."""

from kanformer.conversion.build import convert
from kanformer.conversion.dense import DenseFFN
from kanformer.conversion.statistics import FFNStatistics

__all__ = ["DenseFFN", "FFNStatistics", "convert"]
