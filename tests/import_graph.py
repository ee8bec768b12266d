"""What the modules of the package import, read from their sources: at the top of a file, inside functions, for types only.

A module named in a string counts as imported too ("hopper_moe.eval.cli:main"), because such strings are how modules are loaded
by name. Importing a submodule does not count as importing its package: our packages hold no code that their modules could need.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "hopper_moe"
FLOORS = ("quantization", "kernels", "moe_backends", "launch", "eval")  # each may import those before it


@dataclass(frozen=True)
class Import:
    """`file` (relative to the root) names `target`, a module, in this line."""

    file: str
    line: int
    target: str
    by_name: bool = False  # in a string

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file, of every floor."""
    files = [file for floor in FLOORS for file in sorted((root / floor).rglob("*.py"))]
    return {_module_name(file.relative_to(root)): file for file in files}


def imports(root: Path) -> list[Import]:
    """Every import of every module, in-package targets resolved to the module that is loaded."""
    modules = sources(root)
    return [
        Import(str(file.relative_to(root)), line, _loaded(target, modules), by_name)
        for module, file in modules.items()
        for line, target, by_name in _targets(ast.parse(file.read_text()), _package_of(module, file))
        if not by_name or _loaded(target, modules) in modules
    ]


def against_order(found: list[Import]) -> list[Import]:
    """Imports of a higher floor."""
    return [i for i in found if _is_ours(i.target) and _floor(i.target.split(".")[1]) > _floor(Path(i.file).parts[0])]


def of_third_party(found: list[Import], name: str) -> list[Import]:
    """Imports of the package `name` and of what is in it."""
    return [i for i in found if i.target.split(".")[0] == name]


def circles(found: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    edges: dict[str, set[str]] = {}
    for i in found:
        importer = _module_name(Path(i.file))
        if _is_ours(i.target) and i.target != importer:
            edges.setdefault(importer, set()).add(i.target)
    reached = {module: _reachable(module, edges) for module in edges}
    rings = {tuple(sorted(m for m in beyond if module in reached.get(m, ()))) for module, beyond in reached.items()}
    return sorted(list(ring) for ring in rings if ring)


def _reachable(module: str, edges: Mapping[str, set[str]]) -> set[str]:
    """All that `module` leads to; itself only when on a circle."""
    seen: set[str] = set()
    ahead = list(edges.get(module, ()))
    while ahead:
        if (target := ahead.pop()) not in seen:
            seen.add(target)
            ahead.extend(edges.get(target, ()))
    return seen


def _module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def _package_of(module: str, file: Path) -> str:
    return module if file.stem == "__init__" else module.rpartition(".")[0]


def _targets(tree: ast.Module, package: str) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, whether in a string) of everything imported; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name, False) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{name.name}", False) for name in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}."):
            yield node.lineno, node.value.partition(":")[0], True


def _loaded(target: str, modules: Mapping[str, Path]) -> str:
    """The module of ours that holds the attribute `target`, or `target` itself."""
    name = target
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or target


def _is_ours(target: str) -> bool:
    return target.startswith(f"{PACKAGE}.")


def _floor(folder: str) -> int:
    return FLOORS.index(folder)
