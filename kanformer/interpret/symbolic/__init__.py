"""Formulas for learned functions: fitting, judging, exporting, and putting them into the model. sympy is loaded when a formula is written in it."""

from kanformer.interpret.symbolic.export import (
    fit_stack,
    layer_expressions,
    map_code,
    map_expressions,
    network_expressions,
    node_expression,
)
from kanformer.interpret.symbolic.fit import fit_module, fit_symbolic
from kanformer.interpret.symbolic.fits import OUTCOMES, Candidate, MapFits, SymbolicFits
from kanformer.interpret.symbolic.formula import Formula
from kanformer.interpret.symbolic.library import register_function, unregister_function
from kanformer.interpret.symbolic.snapping import Snapped, snap, unsnap
from kanformer.interpret.symbolic.tables import write_csv, write_json, write_parquet

__all__ = [
    "OUTCOMES",
    "Candidate",
    "Formula",
    "MapFits",
    "Snapped",
    "SymbolicFits",
    "fit_module",
    "fit_stack",
    "fit_symbolic",
    "layer_expressions",
    "map_code",
    "map_expressions",
    "network_expressions",
    "node_expression",
    "register_function",
    "snap",
    "unregister_function",
    "unsnap",
    "write_csv",
    "write_json",
    "write_parquet",
]
