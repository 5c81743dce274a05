"""What the scores of every edge of a map need from the data: a few numbers per edge, by matrix products, never a (tokens, out, in) tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kanformer.conversion import processes
from kanformer.interpret.collecting.sources import Edges

_CHUNK_NUMBERS = 2**22


class EdgeSums:
    """Streams, for phi[o, i](x_i) = sum_m w[m, o, i] f_m(x_i) and node outputs y_o:

    - covariance: sum_t (phi - E phi)(y_o - E y_o).
    - slope: sum_t (phi - E phi) g_o, with g = dL/dy the gradient of the summed loss.
    - curvature: sum_s (sum_{t in s} (phi - E phi) e_o)^2 over stretches s of one sequence, with e the gradient of the probe. Since E[e e^T] is the
      Gauss-Newton matrix of the summed loss, its expectation is (phi - E phi)^T G (phi - E phi), the tokens' interaction through attention included.

    All follow from the weight gradients sum_t f_m(x_i) g_o, one GEMM per plane: sum_t phi g = sum_m w_m (sum_t f_m g).
    During the pass everything is relative to the first batch's means, at the end to those of all data.

    Attributes:
        covariance, slope, curvature: (outputs, inputs) in at least float32, None where not asked for; valid after `finish`.
    """

    def __init__(self, edges: Edges, *, covariance: bool, slope: bool, curvature: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.edges, self.rows = edges, 0

        def table(wanted: bool) -> Tensor | None:
            return torch.zeros(edges.outputs, edges.inputs, dtype=dtype, device=device) if wanted else None

        self.covariance, self.slope, self.curvature, self._crossed = table(covariance), table(slope), table(curvature), table(curvature)
        wide = {"dtype": torch.float64, "device": device}
        self._origin: Tensor | None = None
        self._planes = torch.zeros(edges.count, edges.inputs, **wide)
        self._output_origin = torch.zeros(edges.outputs, **wide)
        self._outputs, self._gradients, self._probes = (torch.zeros(edges.outputs, **wide) for _ in range(3))

    @property
    def tables(self) -> list[Tensor]:
        return [table for table in (self.covariance, self.slope, self.curvature) if table is not None]

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, gradient: Tensor | None, probes: Sequence[Tensor], sizes: list[int]) -> None:
        """Takes in rows of inputs x (tokens, in), outputs y and gradients (tokens, out); `sizes`: rows of each stretch, in order. Probes are averaged."""
        if self._origin is None:
            self._origin = torch.zeros(self.edges.count, self.edges.inputs, dtype=torch.float64, device=x.device)
            for columns in self._columns(x.shape[0]):
                self._origin[:, columns] = torch.stack([plane.double().mean(0) for plane in self.edges.values(x, columns)])
            self._output_origin = y.double().mean(0)
        dtype = (self.tables or [x.float()])[0].dtype
        y = (y.double() - self._output_origin).to(dtype)
        self.rows += x.shape[0]
        self._outputs += y.double().sum(0)
        sides = [(table, side.to(dtype)) for table, side in ((self.covariance, y), (self.slope, gradient)) if table is not None and side is not None]
        if gradient is not None:
            self._gradients += gradient.double().sum(0)
        scale = max(1, len(probes)) ** -0.5
        draws = [(scale * probe).to(dtype).split(sizes) for probe in probes]
        for stretch in (stretch for draw in draws for stretch in draw):
            self._probes += stretch.double().sum(0).square()
        for columns in self._columns(x.shape[0]):
            planes = [(plane.double() - mean).to(dtype) for plane, mean in zip(self.edges.values(x, columns), self._origin[:, columns], strict=True)]
            self._planes[:, columns] += torch.stack([plane.double().sum(0) for plane in planes])
            self._products(columns, planes, sides)
            for draw in draws:
                self._squares(columns, [plane.split(sizes) for plane in planes], draw)

    def _columns(self, rows: int) -> list[slice]:
        step = max(1, _CHUNK_NUMBERS // max(self.edges.outputs, rows * self.edges.count))
        return [slice(first, min(first + step, self.edges.inputs)) for first in range(0, self.edges.inputs, step)]

    def _products(self, columns: slice, planes: Sequence[Tensor], sides: list[tuple[Tensor, Tensor]]) -> None:
        if not sides:
            return
        weights = self.edges.weights(columns, planes[0].dtype)
        for table, side in sides:
            for plane, weight in zip(planes, weights, strict=True):
                table[:, columns].addcmul_(weight, side.t() @ plane)

    def _squares(self, columns: slice, planes: Sequence[Sequence[Tensor]], stretches: Sequence[Tensor]) -> None:
        assert self.curvature is not None and self._crossed is not None
        weights = self.edges.weights(columns, stretches[0].dtype)
        curvature, crossed = self.curvature[:, columns], self._crossed[:, columns]
        product = torch.empty_like(curvature)
        for number, probe in enumerate(stretches):
            total = torch.zeros_like(curvature)
            for plane, weight in zip(planes, weights, strict=True):
                total.addcmul_(weight, torch.mm(probe.t(), plane[number], out=product))
            curvature.addcmul_(total, total)
            crossed.addcmul_(total, probe.sum(0).unsqueeze(1))

    @torch.no_grad()
    def finish(self) -> None:
        """Moves the origin to the means of all processes' data and adds what these saw."""
        rows = processes.reduced(torch.tensor(float(self.rows)))
        if not self.tables:
            self.rows = int(rows)
            return
        origin = torch.zeros_like(self._planes) if self._origin is None else self._origin
        total = max(1.0, float(rows))
        moved = processes.reduced(self._planes + self.rows * origin) / total - origin
        shift = processes.reduced(self._outputs + self.rows * self._output_origin) / total - self._output_origin
        for columns in self._columns(1):
            self._recentre(columns, moved, shift)
        self.rows, self._crossed = int(rows), None
        for name in ("covariance", "slope", "curvature"):
            table = getattr(self, name)
            if table is not None:
                setattr(self, name, processes.reduced(table))

    def _recentre(self, columns: slice, moved: Tensor, shift: Tensor) -> None:
        def curve(values: Tensor) -> Tensor:
            weights = self.edges.weights(columns, torch.float64)
            found = torch.zeros_like(weights[0])
            for weight, value in zip(weights, values[:, columns], strict=True):
                found.addcmul_(weight, value)
            return found

        means = curve(moved)
        if self.covariance is not None:
            change = means * (self.rows * shift - self._outputs).unsqueeze(1) - shift.unsqueeze(1) * curve(self._planes)
            self.covariance[:, columns] += change.to(self.covariance.dtype)
        if self.slope is not None:
            self.slope[:, columns] -= (means * self._gradients.unsqueeze(1)).to(self.slope.dtype)
        if self.curvature is not None and self._crossed is not None:
            change = means.square() * self._probes.unsqueeze(1) - 2 * means * self._crossed[:, columns].double()
            self.curvature[:, columns] += change.to(self.curvature.dtype)


class FunctionSums:
    """The same for whole functions of shared edges: all channels of a group at their means at once, in every output.

    The gradient by hidden channel h_i is (W^T g)_i. Memory: 8 * groups * (channels per group + 1)^2 bytes.

    Attributes:
        curvature: (groups,) as in `EdgeSums`. gradients: (channels,) sum of squares of the gradient by h_i; valid after `finish`.
    """

    def __init__(self, weight: Tensor, groups: int) -> None:
        self.weight, self.groups, self.repeats = weight, groups, weight.shape[1] // groups
        self.gradients = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        self._pairs = torch.zeros(groups, self.repeats + 1, self.repeats + 1, dtype=torch.float64, device=weight.device)
        self._origin: Tensor | None = None
        self.curvature = torch.zeros(groups, dtype=torch.float64)

    @torch.no_grad()
    def add(self, hidden: Tensor, gradients: Sequence[Tensor], probes: Sequence[Tensor], sizes: list[int]) -> None:
        """Takes in rows of hidden channels (tokens, channels), and gradients and probes by the map's outputs (tokens, out), each kind averaged."""
        hidden = hidden.double()
        if self._origin is None:
            self._origin = hidden.mean(0)
        weight = self.weight.detach().double()
        for gradient in gradients:
            self.gradients += (gradient.double() @ weight).square().sum(0) / len(gradients)
        for probe in probes:
            self._add_pairs(hidden - self._origin, probe.double() @ weight * len(probes) ** -0.5, sizes)

    def _add_pairs(self, centred: Tensor, by_hidden: Tensor, sizes: list[int]) -> None:
        products = torch.stack([part.sum(0) for part in (by_hidden * centred).split(sizes)])
        slopes = torch.stack([part.sum(0) for part in by_hidden.split(sizes)])
        both = torch.cat([products.view(-1, self.groups, self.repeats).sum(2, keepdim=True), slopes.view(-1, self.groups, self.repeats)], 2).transpose(0, 1)
        self._pairs.baddbmm_(both.transpose(1, 2), both)

    @torch.no_grad()
    def finish(self, means: Tensor) -> None:
        """Given the mean (channels,) of what every process saw."""
        origin = means.to(self.gradients) if self._origin is None else self._origin
        factors = torch.cat([torch.ones_like(origin[: self.groups]).unsqueeze(1), -(means.to(origin) - origin).view(self.groups, -1)], 1)
        self.curvature = processes.reduced(torch.einsum("ga,gab,gb->g", factors, self._pairs, factors)).cpu()
        self.gradients = processes.reduced(self.gradients).cpu()
