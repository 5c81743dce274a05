"""What the methods of a class do with their parts, read off the source: which are called, and what a value goes through."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator


@functools.cache
def _methods(cls: type) -> tuple[ast.FunctionDef, ...]:
    """The methods that a class writes, and those of its bases that it calls by super()."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return ()
    own = tuple(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name != "__init__")
    called = [node.name for node in own if f"super().{node.name}(" in ast.unparse(node)]
    return own + tuple(node for base in cls.__bases__ for node in _methods(base) if node.name in called)


@functools.cache
def calls_of(cls: type) -> tuple[tuple[str, ...], ...]:
    """For each method of a class the names called on self, see `_step`, in the order in which they run."""
    return tuple(tuple(_called(method)) for method in _methods(cls))


def _called(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        yield from _called(child)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and (step := _step(node)):
        yield step


@functools.cache
def chains_of(cls: type) -> tuple[tuple[str, ...], ...]:
    """The names of what a value goes through on self, one after the other, in the methods of a class."""
    found: list[tuple[str, ...]] = []
    for method in _methods(cls):
        flow = _Flow()
        flow.visit(method)
        found += flow.chains
    return tuple(found)


class _Flow(ast.NodeVisitor):
    """Follows values through calls on self and functional dropout; any other operation ends a chain."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, ...]] = {}
        self.chains: list[tuple[str, ...]] = []

    def visit_Assign(self, node: ast.Assign) -> None:
        chain = self.follow(node.value)
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.known[name.id] = chain if name is target else ()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        chain = () if node.value is None else self.follow(node.value)
        if isinstance(node.target, ast.Name):
            self.known[node.target.id] = chain

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.follow(node.value)
        if isinstance(node.target, ast.Name):
            self.known[node.target.id] = ()

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            self.follow(node)
        else:
            super().generic_visit(node)

    def follow(self, node: ast.expr) -> tuple[str, ...]:
        if isinstance(node, ast.Name):
            return self.known.get(node.id, ())
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            arguments = [self.follow(argument) for argument in (*node.args, *(word.value for word in node.keywords))]
            step = _step(node)
            if step is None:
                return self.follow(node.func.value) if node.func.attr in ("to", "contiguous", "type_as") else ()
            chain = (*(arguments[0] if arguments else ()), step)
            self.chains.append(chain)
            return chain
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.follow(child)
        return ()


def _step(call: ast.Call) -> str | None:
    """`name` for self.name(...), `p=name` for a functional dropout with probability self.name, else None."""
    assert isinstance(call.func, ast.Attribute)
    if isinstance(call.func.value, ast.Name) and call.func.value.id == "self":
        return call.func.attr
    if call.func.attr == "dropout":
        probability = next((word.value for word in call.keywords if word.arg == "p"), None)
        return f"p={probability.attr}" if isinstance(probability, ast.Attribute) else None
    return None
