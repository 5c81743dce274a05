"""Formulas written out: sympy, LaTeX, numpy and torch code compute what was fitted, inside the range, and say when x is outside."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import sympy
import torch
from torch import nn

from kanformer.errors import ConfigError
from kanformer.interpret import Faithfulness, collect
from kanformer.interpret.symbolic import (
    fit_module,
    fit_stack,
    fit_symbolic,
    layer_expressions,
    map_code,
    map_expressions,
    network_expressions,
    node_expression,
    register_function,
    unregister_function,
    write_csv,
    write_json,
    write_parquet,
)
from kanformer.interpret.symbolic.tables import COLUMNS, records
from kanformer.interpret.symbolic.targets import HEADERS, base_label, source, symbolic
from kanformer.layers import EdgeFunctions, KANLinear
from kanformer.layers.base_functions import NAMES, base_function
from symbolic_cases import PLANTED, planted_map, sample, seen_by
from test_interpret import Toy, make_batches, make_block


@pytest.fixture(scope="module")
def planted():
    module = planted_map(list(PLANTED.values()))
    return module, fit_module(module, seen_by(module, sample(1)), tol_node=1.0, negligible=0.0)


def run_code(text: str, name: str):
    space: dict = {}
    exec(compile(text, name, "exec"), space)
    return space[name]


def close(found, wanted: torch.Tensor) -> bool:
    return bool((torch.as_tensor(np.asarray(found)) - wanted).abs().max() <= 1e-6 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", PLANTED)
def test_all_exports_compute_the_fitted_function(planted, name):
    formula = planted[1].formula(list(PLANTED).index(name))
    x = torch.linspace(formula.low, formula.high, 41, dtype=torch.float64)
    wanted = formula.values(x)
    for one in (formula, formula.normalised()):
        assert close(sympy.lambdify("x", one.sympy(sympy.Symbol("x")), ["scipy", "numpy"])(x.numpy()) + 0 * x.numpy(), wanted)
        assert close(run_code(one.code("numpy", "f"), "f")(x.numpy()), wanted)
        assert close(run_code(one.code("torch", "f"), "f")(x), wanted)
    assert r"\le x \le" in formula.latex() and f"{formula.low:.4g} <= x" in run_code(formula.code("torch", "f"), "f").__doc__


def test_code_warns_or_raises_outside_the_range(planted):
    formula = planted[1].formula(0)
    inside, beyond = np.array([formula.low, formula.high]), np.array([formula.high + 0.1])
    for target, of in (("numpy", np.asarray), ("torch", torch.as_tensor)):
        with pytest.warns(UserWarning, match="outside its range"):
            run_code(formula.code(target, "f"), "f")(of(beyond))
        with pytest.raises(ValueError, match="outside its range"):
            run_code(formula.code(target, "f", outside="raise"), "f")(of(beyond))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run_code(formula.code(target, "f"), "f")(of(inside))
            run_code(formula.code(target, "f", outside="ignore"), "f")(of(beyond))
    piecewise = formula.sympy("x", piecewise=True)
    assert piecewise.subs("x", formula.high + 1) is sympy.nan or not piecewise.has(sympy.Symbol("x", real=True)) or piecewise.args[-1][0] is sympy.nan
    for wrong in ({"target": "jax"}, {"name": "f(x): import os #"}, {"outside": "what"}):
        with pytest.raises(ConfigError):
            formula.code(**wrong)


def test_short_constants_stay_within_the_tolerance_and_say_so():
    module = planted_map([lambda x: 2 * torch.tanh(x) + 0.5, lambda x: torch.sin(math.pi * x), lambda x: 1.2345678 * x])
    fits = fit_module(module, seen_by(module, sample(1)), tol_node=0.02)
    exact, nice = fits.formula(0), fits.formula(0, nice=True)
    assert (abs(nice.c), abs(nice.a), nice.t, nice.d) == (2.0, 1.0, 0.0, 0.5) and set(nice.shortened) >= {"a", "t"} and "shortened" in str(nice)
    assert not exact.shortened and nice.nrmse <= 0.02
    nodes = fits.nodes[0]
    assert float((nice.values(nodes) - exact.values(nodes)).square().mean().sqrt() / fits.std[0]) <= 0.02
    assert abs(fits.formula(1, nice=True).a) == math.pi and "pi" in str(fits.formula(1, nice=True).sympy())
    tight = fit_module(module, seen_by(module, sample(1)), tol_node=1e-3)
    assert abs(tight.formula(2, nice=True).e - 1.2345678) < 2e-3 and abs(tight.formula(2, nice=True).e) != 1


@pytest.mark.parametrize("name", NAMES)
def test_base_functions_are_recognised_and_written(name):
    base, z = base_function(name), torch.linspace(-4, 4, 33, dtype=torch.float64)
    label = base_label(base)
    assert label == name
    wanted = base(z)
    for target in ("numpy", "torch"):
        code = f"{HEADERS['numpy']}{HEADERS['torch']}def f(z): return {source(label, target)}"
        assert close(run_code(code, "f")(z.numpy() if target == "numpy" else z), wanted)
    if name != "zero":
        assert close(sympy.lambdify("z", symbolic(label)(sympy.Symbol("z")), ["scipy", "numpy"])(z.numpy()), wanted)
    assert base_label(nn.PReLU(init=0.3)) == "" and base_label(nn.CELU(2.0)) == ""


def test_maps_nodes_and_their_code():
    torch.manual_seed(1)
    module = KANLinear(3, 2, grid_size=4, base="gelu", dtype=torch.float64)
    x = sample(3).double()
    fits = fit_module(module, seen_by(module, x), tol_node=1.0, r2_min=0.0)
    probe = x[((x > fits.low[[0, 2, 4]]) & (x < fits.high[[0, 2, 4]])).all(1)][:50]
    wanted = module.kan_bias.detach() + torch.stack(  # type: ignore[union-attr]
        [sum(fits.formula(fits.find(i, o)).values(probe[:, i]) for i in range(3)) for o in range(2)], 1
    )
    symbols = sympy.symbols("x0:3", real=True)
    found = sympy.lambdify(symbols, map_expressions(module, fits), ["scipy", "numpy"])(*probe.t().numpy())
    assert close(np.stack(found, 1), wanted)
    for target in ("numpy", "torch"):
        function = run_code(map_code(module, fits, target, "layer"), "layer")
        assert close(function(probe.numpy() if target == "numpy" else probe), wanted)
        with pytest.warns(UserWarning, match="outside its range"):
            function(10 * (probe.numpy() if target == "numpy" else probe))
    strict = fit_module(module, seen_by(module, x), tol_node=0.0, r2_min=1.0)
    with pytest.raises(ConfigError, match="no family within the tolerances"):
        map_expressions(module, strict)
    assert "phi_1_2(x2)" in str(node_expression(module, strict, 1, unsnapped="function"))


def test_shared_functions_and_the_blocks_outputs():
    model, batches = Toy([make_block(grid_size=4, groups=5)]), make_batches()
    fits = fit_symbolic(model, collect(model, batches), tol_node=1.0, r2_min=0.0)["layers.0"]
    block, one = model.layers[0], fits["kan_functions"]
    h = torch.zeros(1, 10, dtype=torch.float64)
    hidden = torch.tensor([float(one.formula(c // 2).values(h[0, c])) for c in range(10)])
    wanted = block.kan_down.weight.detach()[4] @ hidden + block.kan_down.bias.detach()[4]  # type: ignore[union-attr,index]
    assert float(
        node_expression(block, one, 4).subs({f"x{i}": 0 for i in range(10)}).evalf(subs={sympy.Symbol(f"x{i}", real=True): 0 for i in range(10)})
    ) == pytest.approx(float(wanted), abs=1e-5)
    assert len(layer_expressions(block, fits)["kan_functions"]) == 10  # type: ignore[arg-type]
    code = run_code(map_code(block.kan_functions, one, "numpy", "psi", outside="ignore"), "psi")  # type: ignore[arg-type]
    assert close(code(h.numpy())[0], hidden.double())


def test_a_network_becomes_formulas_of_its_inputs():
    """[2, 3, 1]: exp(sin(pi x0) + x1^2)-like, planted into the splines."""
    torch.manual_seed(0)
    first, last = (
        KANLinear(2, 3, grid_size=100, grid_range=(-3, 3), dtype=torch.float64),
        KANLinear(3, 1, grid_size=100, grid_range=(-12, 12), dtype=torch.float64),
    )
    plans = {
        first: [[lambda x: torch.sin(2 * x), lambda x: x**2], [torch.tanh, lambda x: 0 * x], [lambda x: 0.5 * x, lambda x: -x]],
        last: [[lambda x: 0.1 * x**2, torch.tanh, lambda x: x]],
    }
    with torch.no_grad():
        for module, rows in plans.items():
            module.kan_base_weight.zero_()
            module.kan_bias.fill_(0.25)  # type: ignore[union-attr]
            lo, hi = (float(bound[0]) for bound in module.grid_bounds)
            x = torch.linspace(lo, hi, 1500, dtype=torch.float64)
            members = module.basis.evaluate(x.unsqueeze(1), module.kan_grid[:1].double())[:, 0]
            for o, row in enumerate(rows):
                for i, function in enumerate(row):
                    module.kan_coef[o, :, i] = torch.linalg.lstsq(members, function(x).unsqueeze(1)).solution[:, 0]
    stack = nn.Sequential(first, last)
    samples = sample(2).double()
    fits = fit_stack(stack, samples, tol_node=0.02)
    assert all(bool(one.accepted.all()) for one in fits)
    (expression,) = network_expressions(stack, fits)
    symbols = sympy.symbols("x0:2", real=True)
    assert expression.free_symbols == set(symbols)
    found = sympy.lambdify(symbols, expression, ["scipy", "numpy"])(*samples.t().numpy())
    wanted = stack(samples).detach()[:, 0]
    assert float((torch.as_tensor(found) - wanted).square().mean().sqrt() / wanted.std()) < 0.02
    with pytest.raises(ConfigError, match="fits of 1 maps"):
        network_expressions(stack, fits[:1])
    with pytest.raises(ConfigError, match="3 outputs before 2 inputs"):
        network_expressions([first, first], [fits[0], fits[0]])


def test_registered_functions_are_exported_by_their_sympy_form():
    register_function("bell", lambda z: 1 / torch.cosh(z), lambda z: 1 / sympy.cosh(z), mirrored=False)
    try:
        module = planted_map([lambda x: 1 / torch.cosh(2 * (x - 0.2))])
        formula = fit_module(module, seen_by(module, sample(1)), library=["bell"], tol_node=0.02).formula(0)
        x = torch.linspace(formula.low, formula.high, 21, dtype=torch.float64)
        assert formula.family == "bell"
        assert close(run_code(formula.code("numpy", "f"), "f")(x.numpy()), formula.values(x))
        assert close(run_code(formula.code("torch", "f"), "f")(x), formula.values(x))
    finally:
        unregister_function("bell")


def test_tables(tmp_path):
    model, batches = Toy([make_block(edges="full", grid_size=4)]), make_batches()
    stats = collect(model, batches, scores=("sens",), loss=lambda outputs, batch: outputs.square().mean())
    stats.header = Faithfulness(2.0, 4.0)
    fits = fit_symbolic(model, stats, edges=4)
    assert fits.header is stats.header
    found = json.loads(write_json(fits, tmp_path / "fits.json").read_text())
    assert (found["schema"], found["version"]) == ("kanformer.symbolic", 2) and [one["map"] for one in found["maps"]] == ["kan_up", "kan_down"]
    rows = list(csv.DictReader(write_csv(fits, tmp_path / "fits.csv").open()))
    first = fits["layers.0"]["kan_up"]
    assert len(rows) == 8 and (int(rows[0]["input"]), int(rows[0]["output"])) == (int(first.input[0]), int(first.output[0]))
    assert float(rows[0]["r2"]) == pytest.approx(float(first.r2[0])) and rows[0]["family"] == found["maps"][0]["functions"][0]["family"]
    assert found["maps"][0]["outcomes"] == first.counts() and found["header"] == stats.header.to_dict()
    assert found["maps"][0]["score_name"] == "sens" and [float(row["score"]) for row in rows[:4]] == pytest.approx(first.score.tolist())
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(write_parquet(fits, tmp_path / "fits.parquet"))
    assert table.to_pylist() == [{name: row[name] for name in COLUMNS} for one in fits.all_maps() for row in records(one)]
    assert json.loads(table.schema.metadata[b"header"]) == found["header"] and table.schema.metadata[b"version"] == b"2"
    bare = fit_symbolic(model, collect(model, batches), edges=4)
    assert parquet.read_table(write_parquet(bare, tmp_path / "bare.parquet")).column("score").to_pylist() == [None] * 8 and bare.header is None


def test_fitting_and_snapping_need_no_sympy():
    code = (
        "import sys; sys.modules['sympy'] = None\n"
        "import torch, kanformer; from kanformer.interpret.symbolic import fit_module; from symbolic_cases import sample, seen_by\n"
        "module = kanformer.KANLinear(2, 2, grid_size=3); fits = fit_module(module, seen_by(module, sample(2)))\n"
        "kanformer.snap; print(len(fits), fits.formula(0, nice=True).code() != '' if fits.accepted[0] else True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout.split() == ["4", "True"], done.stderr


def test_shared_channels_of_a_group_have_one_formula():
    module = EdgeFunctions(4, 2, grid_size=4, base="tanh")
    fits = fit_module(module, seen_by(module, sample(4)))
    left, right = map_expressions(module, fits)[:2]
    assert left.subs(sympy.Symbol("x0", real=True), sympy.Symbol("q")) == right.subs(sympy.Symbol("x1", real=True), sympy.Symbol("q"))
    assert fits.families[int(fits.family[0])] == "base" and fits.formula(0).function == "tanh"
