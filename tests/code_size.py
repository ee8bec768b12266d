"""What is too long or takes too many arguments, by the syntax tree of a source."""

from __future__ import annotations

import ast
from collections.abc import Iterator

MAX_LINES = 60  # of a function, from `def` to its last line
MAX_PARAMETERS = 8  # of a constructor, without `self`


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines) of the functions that are too long."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_LINES:
                yield node.name, lines


def wide_constructors(source: str) -> Iterator[tuple[str, int]]:
    """(class, parameters) of the constructors that take too many. Frozen dataclasses may: they are records."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and (count := _parameters(node)) > MAX_PARAMETERS:
            yield node.name, count


def _parameters(cls: ast.ClassDef) -> int:
    written = [item for item in cls.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    if written:
        args = written[0].args
        return len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs) - 1
    decorators = [ast.unparse(decorator) for decorator in cls.decorator_list]
    if any("dataclass" in text and "frozen=True" not in text for text in decorators):
        return sum(isinstance(item, ast.AnnAssign) and "init=False" not in ast.unparse(item) for item in cls.body)
    return 0
