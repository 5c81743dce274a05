"""Plants known formulas into a map with full edges, fits them, and prints how many are found and how long an edge takes.

python scripts/measure_symbolic.py --inputs 16 --outputs 512 --amplitude 1
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from torch import Tensor

from kanformer.conversion.histogram import ChannelRecorder
from kanformer.interpret.symbolic import OUTCOMES, fit_module
from kanformer.interpret.symbolic.library import families
from kanformer.layers import KANLinear
from kanformer.layers.formula_functions import BUILT_IN, formula_function

RANGE = 5.0


def planted(inputs: int, outputs: int, amplitude: float, scale: float) -> tuple[KANLinear, list[str], Tensor]:
    """(map, names, which one each edge (in, out) has): c * f(a * (x - t)) as splines on 400 cells, a and t at random."""
    names = ["x", *BUILT_IN]
    which = torch.randint(0, len(names), (inputs, outputs))
    x = torch.linspace(-RANGE, RANGE, 4001, dtype=torch.float64)
    module = KANLinear(inputs, outputs, grid_size=400, grid_range=(-RANGE * scale, RANGE * scale), dtype=torch.float64)
    with torch.no_grad():
        module.kan_base_weight.zero_()
        members = module.basis.evaluate(x.unsqueeze(1) * scale, module.kan_grid[:1].double())[:, 0]
        a = (torch.rand(inputs, outputs) * 2.5 + 0.4) * torch.where(torch.rand(inputs, outputs) < 0.5, -1.0, 1.0)
        t = torch.randn(inputs, outputs)
        for i in range(inputs):
            values = torch.stack([value(names[int(which[i, o])], x, float(a[i, o]), float(t[i, o])) for o in range(outputs)], 1)
            values = amplitude * values / values.std(0).clamp(min=1e-3)
            module.kan_coef[:, :, i] = torch.linalg.lstsq(members, values).solution.t()
    return module, names, which


def value(name: str, x: Tensor, a: float, t: float) -> Tensor:
    """A planted function; those with a domain keep the data inside it."""
    if name == "x":
        return a * x
    family = families()[name]
    if family.pole or family.domain[0] > -RANGE:
        return formula_function(name).value(abs(a) * (x + RANGE + 0.3))
    return formula_function(name).value(a * (x - t))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("inputs", 16), ("outputs", 512), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("amplitude", "scale"):
        parser.add_argument(f"--{name}", type=float, default=1.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    module, names, which = planted(arguments.inputs, arguments.outputs, arguments.amplitude, arguments.scale)
    noise = torch.randn(20_000, arguments.inputs)
    x = ((noise + 0.15 * noise**3) / 1.6).clamp(-RANGE, RANGE).double() * arguments.scale
    recorder = ChannelRecorder(arguments.inputs, arguments.inputs, *module.grid_bounds)
    recorder.add(x)
    seen = recorder.finish()
    wall, cpu = time.perf_counter(), time.process_time()
    fits = fit_module(module, seen, tol_node=1.0, negligible=0.0)
    wall, cpu, edges = time.perf_counter() - wall, time.process_time() - cpu, len(fits)
    truth = torch.tensor([fits.families.index(name) for name in names])[which.flatten()]
    found = fits.equivalent[torch.arange(edges), truth] | ((truth == fits.families.index("silu")) & fits.equivalent[:, fits.families.index("base")])
    first = (fits.family == truth) | ((truth == fits.families.index("silu")) & (fits.family == fits.families.index("base")))
    print(f"{edges:,} edges, {len(fits.families)} families: {1e3 * wall / edges:.3f} ms per edge by the clock, {1e3 * cpu / edges:.3f} ms of one core")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"planted family in the equivalence set: {found.double().mean():.4f}, chosen: {first.double().mean():.4f}")
    print(f"families per equivalence set: {fits.equivalent.sum(1).double().mean():.2f}, R2 > 0.9999: {(fits.r2 > 0.9999).double().mean():.4f}")
    print(", ".join(f"{name} {count:,}" for name, count in zip(OUTCOMES, fits.counts().values(), strict=True)))
    for number, name in enumerate(names):
        some = which.flatten() == number
        print(f"  {name:9} in the set {found[some].double().mean():.3f}, chosen {first[some].double().mean():.3f}")


if __name__ == "__main__":
    main()
