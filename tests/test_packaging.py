"""The distribution: wheel and editable installs in clean environments, and what they must not expose."""

from __future__ import annotations

import json
import platform
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hopper_moe.kernels import jit, workspace

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("moe_backends", "quantization", "kernels", "eval", "launch")
HEAVY = ("sglang", "transformers", "accelerate", "fastapi", "sgl_eval", "flashinfer")
UV = Path(sys.executable).with_name("uv")


def _is_shipped(path: Path) -> bool:
    """What was measured, recipes, and pages about a sub-package, stay in the repository."""
    parts = path.relative_to(ROOT).parts
    measured = "results" in parts or (path.parent.name == "accuracy_table" and path.suffix != ".py")
    page = path.name == "README.md" and len(parts) > 2 and "data" not in parts
    return not measured and not page and "recipes" not in parts


def _source_files() -> list[str]:
    """Every shipped file of the five folders, relative to the root."""
    return sorted(
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".") and _is_shipped(path)
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree, so that building leaves nothing in the checkout and finds nothing of earlier builds."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def _build_wheel(source: Path, out: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source], check=True, capture_output=True
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return _build_wheel(source, tmp_path_factory.mktemp("wheel"))


def _environment(folder: Path, install: list[str], without: tuple[str, ...] = ()) -> Path:
    """A new venv with only our package in it, borrowing this environment's other packages (no 9 GB download)."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    packages = Path(site.getsitepackages()[0])
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for entry in packages.iterdir():
        own = "hopper_moe" in entry.name or entry.suffix == ".pth"
        if not own and not entry.name.replace("-", "_").startswith(without or ("\0",)):
            (borrowed / entry.name).symlink_to(entry)
    target = next((folder / "lib").glob("python3.*")) / "site-packages"
    (target / "borrowed.pth").write_text(f"{borrowed}\n")
    subprocess.run(
        [UV, "pip", "install", "--quiet", "--no-build-isolation", "--python", python, "--no-deps", *install], check=True
    )
    return python


@pytest.fixture(scope="module")
def wheel_python(wheel, tmp_path_factory) -> Path:
    return _environment(tmp_path_factory.mktemp("wheel_env") / "venv", [str(wheel)])


@pytest.fixture(scope="module")
def editable_python(source, tmp_path_factory) -> Path:
    return _environment(tmp_path_factory.mktemp("editable_env") / "venv", ["-e", str(source)])


@pytest.fixture(scope="module")
def light_python(wheel, tmp_path_factory) -> Path:
    """An environment of somebody who installed none of the extras."""
    return _environment(tmp_path_factory.mktemp("light_env") / "venv", [str(wheel)], HEAVY)


def _run(python: Path, code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_wheel_holds_every_source_file_and_nothing_at_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name.removeprefix("hopper_moe/") for name in names if name.startswith("hopper_moe/")) == _source_files()
    assert {name.split("/")[0] for name in names} == {"hopper_moe", next(n for n in names if ".dist-info/" in n).split("/")[0]}


IMPORT_ALL = """
import importlib, sys
for name in MODULES:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
for name in ("moe_backends", "quantization", "eval", "launch"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"bare {name} is importable")
import kernels
print(kernels.__file__)
"""


@pytest.mark.parametrize("environment", ["wheel_python", "editable_python"])
def test_every_module_imports_and_no_bare_folder_does(environment, request, tmp_path):
    python = request.getfixturevalue(environment)
    files = [Path(name) for name in _source_files() if name.endswith(".py")]
    parts = [file.with_suffix("").parts for file in files]
    modules = [
        ".".join(("hopper_moe", *(part[:-1] if part[-1] == "__init__" else part))) for part in parts if part[-1] != "__main__"
    ]
    done = _run(python, f"MODULES = {json.dumps(modules)}\n{IMPORT_ALL}", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    third_party = Path(done.stdout.split()[-1])
    assert third_party.parent.parent == python.parent.parent / "borrowed", "`import kernels` must give the third-party package"


@pytest.mark.parametrize("environment", ["wheel_python", "editable_python"])
def test_entry_points(environment, request, tmp_path):
    python = request.getfixturevalue(environment)
    code = (
        "import importlib.metadata as m, sys\n"
        "plugin = m.entry_points(group='sglang.srt.plugins', name='hopper_moe')\n"
        "print([p.value for p in plugin], m.version('sglang-hopper-moe'))"
    )
    done = _run(python, code, tmp_path)
    assert done.stdout.split() == ["['hopper_moe.moe_backends.sglang.plugin:register']", "0.1.0"], done.stderr
    shown = subprocess.run(
        [python.with_name("hopper-moe"), "--version"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert shown.stdout.strip() == "hopper-moe, version 0.1.0"


def test_help_imports_neither_torch_nor_sglang(wheel_python, tmp_path):
    shows_help = "import sys; from hopper_moe.launch.cli import main; main(['--help'], standalone_mode=False); "
    names_imports = "sys.exit(', '.join({'torch', 'sglang', 'transformers', 'numpy'} & set(sys.modules)) or None)"
    done = _run(wheel_python, shows_help + names_imports, tmp_path)
    assert done.returncode == 0, f"help imported {done.stderr}"
    assert all(name in done.stdout for name in ("serve", "demo", "doctor", "env", "eval", "checkpoint", "kernels"))


def test_works_without_any_extra(light_python, tmp_path):
    """No sglang, no transformers: doctor says what is missing and still calls the machine fit for the reference kernel."""
    code = (
        "import hopper_moe.moe_backends.registry as r, hopper_moe.kernels.reference, hopper_moe.quantization.packing\n"
        "from hopper_moe.moe_backends.env import load\n"
        "print(r.choose(load({}), None).spec.name)"
    )
    done = _run(light_python, code, tmp_path)
    assert done.stdout.strip() == "reference", done.stderr[-2000:]
    shown = subprocess.run(
        [light_python.with_name("hopper-moe"), "doctor"], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "sglang" in shown.stdout and "not installed: pip install 'sglang-hopper-moe[sglang]'" in shown.stdout
    assert "pip install 'sglang-hopper-moe[host]'" in shown.stdout
    assert (
        shown.stdout.strip().splitlines()[-1] == "Ready. Works here: `hopper-moe checkpoint`, the reference kernel from Python."
    )


def test_a_wheel_with_compiled_kernels_is_tagged_and_serves_without_a_compiler(source, wheel, prebuilt, tmp_path):
    """What `make wheel-cubins` makes, in an environment whose PATH is empty. The plain wheel stays pure."""
    assert wheel.name.endswith("-py3-none-any.whl")
    copy = shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for library in jit.LIBRARIES.values():
        path = jit.path_in(prebuilt, library)
        shutil.copytree(path.parent, copy / "kernels" / "prebuilt" / path.parent.name)
    carrying = _build_wheel(copy, tmp_path / "out")
    assert carrying.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    python = _environment(tmp_path / "venv", [str(carrying)])
    code = (
        "from hopper_moe.kernels import jit\n"
        "for name, library in jit.LIBRARIES.items():\n"
        "    assert jit.find(library).is_relative_to(jit.PREBUILT_DIR)\n"
        "    print(len(jit.load(name)['workspace_layout']([4096, 2048, 6, 256, 32, 64, 8, 2, 512, 4096, 1, 1])))"
    )
    environ = {"PATH": "", "CUDA_HOME": "/nonexistent", "HOME": str(tmp_path / "home")}
    done = subprocess.run([python, "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [str(len(workspace.WORKSPACE_FIELDS))] * len(jit.LIBRARIES), done.stderr
    assert not (tmp_path / "home").exists()
