"""Functions of at most 60 lines and constructors of at most 8 parameters, in the package and in the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from code_size import MAX_LINES, MAX_PARAMETERS, long_functions, wide_constructors
from import_graph import FLOORS

ROOT = Path(__file__).parents[1]
CODE = [file for folder in (*FLOORS, "tests") for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("rule", [long_functions, wide_constructors])
def test_code_is_small(rule):
    too_large = [f"{file.relative_to(ROOT)}: {name} {count}" for file in CODE for name, count in rule(file.read_text())]
    assert not too_large, "\n".join(too_large)


def test_a_long_function_is_reported():
    longest = "class A:\n    async def f(self):\n" + "        x = 1\n" * (MAX_LINES - 1)
    assert list(long_functions(longest)) == []
    assert list(long_functions(longest + "        x = 2\n")) == [("f", MAX_LINES + 1)]


def test_a_wide_constructor_is_reported():
    names = [f"p{n}" for n in range(MAX_PARAMETERS)]
    written = "class A:\n    def __init__(self, {}): ..."
    assert list(wide_constructors(written.format(", ".join(names)))) == []
    assert list(wide_constructors(written.format(", ".join(names) + ", *, last"))) == [("A", MAX_PARAMETERS + 1)]


def test_a_wide_dataclass_is_reported_unless_frozen():
    fields = "".join(f"    f{n}: int = {n}\n" for n in range(MAX_PARAMETERS + 1))
    assert list(wide_constructors(f"@dataclass\nclass A:\n{fields}")) == [("A", MAX_PARAMETERS + 1)]
    assert list(wide_constructors(f"@dataclass(frozen=True)\nclass A:\n{fields}")) == []
    assert list(wide_constructors(f"@dataclass\nclass A:\n{fields}".replace("= 0", "= field(init=False)"))) == []
