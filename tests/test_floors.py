"""The order of the folders: quantization < kernels < moe_backends < launch < eval, and SGLang behind a wall of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from import_graph import FLOORS, against_order, circles, imports, of_third_party

ROOT = Path(__file__).parents[1]
SGLANG_WALL = "moe_backends/sglang/"

# Outside of the wall: what is made of SGLang's own parts, and why it stands where it does.
NEEDS_SGLANG = {
    "quantization/layer_backend.py": "types of SGLang's layer and its sizes, for annotations only",
    "quantization/sglang_checks.py": "type of SGLang's layer, for annotations only",
    "quantization/sglang_refresh.py": "type of SGLang's layer, for annotations only",
    "quantization/sglang_loading.py": "type of SGLang's layer, for annotations only",
    "quantization/sglang_method.py": "subclass of SGLang's quant method; what it calls is injected by moe_backends/sglang",
    "launch/sglang_args.py": "SGLang's own parser reads the flags of a launch",
    "eval/layer_bench/baselines/humming.py": "measures SGLang's Humming runner",
    "eval/layer_bench/baselines/marlin.py": "measures SGLang's Marlin kernel",
    "eval/layer_bench/placement.py": "experts are placed by SGLang's own EPLB",
    "eval/serving_bench/load.py": "SGLang's load generator",
    "eval/serving_bench/random_v41.py": "the hash layout of Engram's tables is SGLang's",
    "eval/serving_bench/stock_rows.py": "calls SGLang's fused hyper-connections by themselves",
    "eval/serving_bench/trainer_group.py": "SGLang's own way to join a process group for its weight calls",
    "eval/serving_bench/trainer_tensors.py": "SGLang's own form of tensors for its weight calls",
}

# The command line lists the sub-commands of every folder by name and imports the one that runs.
ENTRY_POINT = "launch/cli.py"


@pytest.fixture(scope="module")
def found():
    return imports(ROOT)


def test_no_import_against_the_order(found):
    upwards = [i for i in against_order(found) if not (i.file == ENTRY_POINT and i.by_name)]
    assert not upwards, "\n".join(map(str, upwards))


def test_no_circle_of_files(found):
    assert circles(found) == []


def test_sglang_is_imported_behind_its_wall_only(found):
    outside = {i.file for i in of_third_party(found, "sglang") if not i.file.startswith(SGLANG_WALL)}
    assert outside == set(NEEDS_SGLANG)


@pytest.mark.parametrize("folder", FLOORS)
def test_the_type_checker_sees_every_folder(folder):
    """mypy is content with a folder that it does not find: where links became plain files, it checked nothing."""
    assert (ROOT / "typecheck/hopper_moe" / folder).resolve() == ROOT / folder


PLANTED_UPWARDS = {
    "at the top": "from hopper_moe.kernels.jit import build",
    "a module of a package": "from hopper_moe.kernels import jit",
    "by its full name": "import hopper_moe.kernels.jit",
    "inside a function": "def load():\n    from hopper_moe.kernels import jit",
    "for types only": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hopper_moe.kernels.jit import Library",
    "relative": "from ..kernels import jit",
    "relative, an attribute": "from ..kernels.jit import build",
    "by name": "COMMAND = 'hopper_moe.kernels.jit:main'",
}


@pytest.mark.parametrize("source", PLANTED_UPWARDS.values(), ids=PLANTED_UPWARDS)
def test_a_planted_import_against_the_order_is_reported(tmp_path, source):
    _plant(tmp_path, {"quantization/codecs.py": source, "kernels/jit.py": "from hopper_moe.quantization import codecs"})
    (report,) = against_order(imports(tmp_path))
    line = source.count("\n") + 1
    assert str(report) == f"quantization/codecs.py:{line} imports hopper_moe.kernels.jit"


def test_a_planted_circle_is_reported(tmp_path):
    _plant(
        tmp_path,
        {
            "kernels/a.py": "from hopper_moe.kernels.b import one",
            "kernels/b.py": "def lazily():\n    from .sub import two",
            "kernels/sub/__init__.py": "from ..a import three",
            "kernels/outside.py": "from hopper_moe.kernels import a",
            "kernels/alone.py": "import hopper_moe.quantization",
        },
    )
    assert circles(imports(tmp_path)) == [["hopper_moe.kernels.a", "hopper_moe.kernels.b", "hopper_moe.kernels.sub"]]


def test_a_planted_import_of_sglang_is_reported(tmp_path):
    _plant(tmp_path, {"kernels/a.py": "def lazily():\n    from sglang.srt import utils", "kernels/b.py": "import sglang_like"})
    assert [i.file for i in of_third_party(imports(tmp_path), "sglang")] == ["kernels/a.py"]


def _plant(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source + "\n")
