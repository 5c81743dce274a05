"""The control without gradient steps: the best affine map in the place of each block, of low rank where the budget asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kanformer.conversion.affine import AffineMoments
from kanformer.conversion.prune import damping
from kanformer.errors import ConfigError
from kanformer.layers import KANFeedForward


@dataclass(frozen=True)
class LinearMap:
    """y = (x right) left + bias, or y = x right + bias where `left` is None.

    Attributes:
        right: (d, k), or (d, o). left: (k, o). bias: (o,).
    """

    right: Tensor
    left: Tensor | None
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., o), in the dtype of x."""
        inner = x @ self.right.to(x)
        return (inner if self.left is None else inner @ self.left.to(x)) + self.bias.to(x)

    @property
    def parameters(self) -> int:
        return self.right.numel() + self.bias.numel() + (0 if self.left is None else self.left.numel())


def rank_within(budget: int, in_features: int, out_features: int) -> int | None:
    """The rank of the best map with at most `budget` parameters: k (d + o) + o of them, or d o + o for the full map, which is None.

    Raises:
        ConfigError: not even the bias fits.
    """
    if budget >= (in_features + 1) * out_features:
        return None
    if budget < out_features:
        raise ConfigError("fit a linear map into the budget", got=f"{budget:,} parameters", expected=f"at least {out_features:,}")
    return (budget - out_features) // (in_features + out_features)


def linear_parameters(rank: int | None, in_features: int, out_features: int) -> int:
    """Parameters of the map of this rank, None being the full one."""
    return out_features + (in_features * out_features if rank is None else rank * (in_features + out_features))


def fit_linear(moments: AffineMoments, rank: int | None, ridge: float) -> LinearMap:
    """The affine map of at most this rank with the least squared error plus `ridge` (in units of the mean variance of x) times its squared norm.

    On centred rows the full map is W = (S_xx + c I)^-1 S_xy; that of rank k is W V V^T, where the columns of V are the k leading eigenvectors of
    S_yx (S_xx + c I)^-1 S_xy. All in float64.

    Source: Mukherjee and Zhu 2011, "Reduced rank ridge regression and its kernel extensions", section 2.
    """
    count = moments.gram[0, 0]
    mean_x, mean_y = moments.gram[0, 1:] / count, moments.cross[0] / count
    covariance = moments.gram[1:, 1:] / count - torch.outer(mean_x, mean_x)
    cross = moments.cross[1:] / count - torch.outer(mean_x, mean_y)
    weight = torch.cholesky_solve(cross, torch.linalg.cholesky(covariance + damping(covariance, ridge)))
    if rank is None:
        return LinearMap(weight, None, mean_y - mean_x @ weight)
    leading = torch.linalg.eigh(cross.t() @ weight).eigenvectors[:, weight.shape[1] - rank :]
    right = weight @ leading
    return LinearMap(right, leading.t().contiguous(), mean_y - mean_x @ right @ leading.t())


@contextlib.contextmanager
def linear_blocks(model: nn.Module, maps: Mapping[str, LinearMap]) -> Iterator[None]:
    """Within the block the patched blocks at these paths give what the maps make of their inputs; dropout and residuals around them stay."""
    handles = []
    for path, chosen in maps.items():
        block = model.get_submodule(path)
        assert isinstance(block, KANFeedForward)
        handles += _replace(block, chosen)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replace(block: KANFeedForward, chosen: LinearMap) -> list:
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple) -> None:
        inputs[:] = [args[0].movedim(1, -1) if block.channels_first else args[0]]

    def give(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return chosen(inputs.pop()).to(output)

    return [block.register_forward_pre_hook(before), block.output_dropout.register_forward_hook(give)]


def save_maps(maps: Mapping[str, LinearMap], path: Path) -> None:
    """Writes a safetensors file: `PATH.right`, `PATH.left` where there is one, `PATH.bias`, in float32."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{part}": getattr(each, part) for name, each in maps.items() for part in ("right", "left", "bias") if getattr(each, part) is not None}
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, path)


def load_maps(path: Path) -> dict[str, LinearMap]:
    """Reads what `save_maps` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = [name.removesuffix(".bias") for name in tensors if name.endswith(".bias")]
    return {name: LinearMap(tensors[f"{name}.right"], tensors.get(f"{name}.left"), tensors[f"{name}.bias"]) for name in names}
