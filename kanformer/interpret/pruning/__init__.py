"""Taking out what does not matter: edges, which become zeros for good, and hidden channels, which make the matrices smaller."""

from kanformer.interpret.pruning.curve import PruneCurve, prune_curve
from kanformer.interpret.pruning.prune import Pruned, prune

__all__ = ["PruneCurve", "Pruned", "prune", "prune_curve"]
