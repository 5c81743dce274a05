"""Levenberg and Marquardt for small networks: a fit to the last digits in tens of steps, where gradients alone take thousands."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from kanformer.errors import ConfigError

_TRIES = 12  # larger dampings within one step
_SOFTER, _HARDER = 0.2, 4.0
_LEAST, _FLOOR = 1e-14, 1e-12
_NUMBERS = 2**24  # of the Jacobian at the same time
MAX_PARAMETERS = 8192  # whose normal equations are 512 MiB in float64


class LevenbergMarquardt:
    """Minimises the mean square of network(x) - y, one damped Gauss-Newton step per call.

    The normal equations are summed over slices of the samples, so memory is that of (parameters, parameters) numbers whatever their number; they are
    solved in float64, damped by Marquardt's diagonal. A step that lowers the loss is kept and softens the damping; another is undone.

    Attributes:
        moved: whether the last step lowered the loss.

    Raises:
        ConfigError: more parameters than `MAX_PARAMETERS`.
    Source: Marquardt 1963, doi:10.1137/0111030.
    """

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, damping: float = 1e-3) -> None:
        self.network, self.x, self.y, self.damping = network, x, y, damping
        self.parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
        count = sum(value.numel() for value in self.parameters.values())
        if count > MAX_PARAMETERS:
            hint = "Use optimizer='lbfgs' or 'adam'."
            raise ConfigError("fit a KAN by Levenberg-Marquardt", got=f"{count:,} parameters", expected=f"at most {MAX_PARAMETERS:,}", hint=hint)
        self.moved = True

    @torch.no_grad()
    def step(self) -> float:
        """One step. Returns the mean squared error after it."""
        gram, slope = self._normal_equations()
        scale = gram.diagonal()
        scale = scale.clamp(min=_FLOOR * float(scale.max()))
        start, loss = self._vector(), self._loss()
        for _ in range(_TRIES):
            factor, failed = torch.linalg.cholesky_ex(gram + self.damping * torch.diag(scale))
            if not int(failed):
                self._set(start - torch.cholesky_solve(slope.unsqueeze(1), factor).squeeze(1))
                after = self._loss()
                if after < loss:
                    self.damping, self.moved = max(self.damping * _SOFTER, _LEAST), True
                    return after
            self.damping *= _HARDER
        self._set(start)
        self.moved = False
        return loss

    def _loss(self) -> float:
        return float((self.network(self.x) - self.y).double().square().mean())

    def _vector(self) -> Tensor:
        return torch.cat([value.flatten().double() for value in self.parameters.values()])

    def _set(self, vector: Tensor) -> None:
        for value, part in zip(self.parameters.values(), vector.split([value.numel() for value in self.parameters.values()]), strict=True):
            value.copy_(part.view_as(value))

    def _normal_equations(self) -> tuple[Tensor, Tensor]:
        """(J^T J, J^T r) in float64, J the derivative of every output of every sample in the parameters."""
        fixed = {name: value.detach() for name, value in self.parameters.items()}
        count = sum(value.numel() for value in fixed.values())

        def outputs(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.network, parameters, (x.unsqueeze(0),)).squeeze(0)

        derivative = vmap(jacrev(outputs), in_dims=(None, 0))
        gram, slope = self.x.new_zeros(count, count, dtype=torch.float64), self.x.new_zeros(count, dtype=torch.float64)
        size = max(1, _NUMBERS // (count * self.y.shape[1]))
        for x, y in zip(self.x.split(size), self.y.split(size), strict=True):
            parts = derivative(fixed, x)
            jacobian = torch.cat([parts[name].flatten(2) for name in fixed], 2).flatten(0, 1).double()
            gram.addmm_(jacobian.t(), jacobian)
            slope.addmv_(jacobian.t(), (self.network(x) - y).double().flatten())
        return gram, slope
