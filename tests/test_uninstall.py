"""`pip uninstall sglang-hopper-moe` leaves SGLang exactly as it was: every file, every hook, every choice of its command line."""

from __future__ import annotations

import hashlib
import json
import subprocess
from importlib.metadata import version
from pathlib import Path

from test_packaging import UV, _environment, source, wheel  # noqa: F401 (fixtures)

# What stock SGLang knows of MoE backends after its plugins are loaded, and which of its functions are wrapped.
LOOK = """
import importlib.metadata, json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES
found = {
    "entry_points": sorted(e.name for e in importlib.metadata.entry_points(group="sglang.srt.plugins")),
    "choices": list(MOE_RUNNER_BACKEND_CHOICES),
    "patched": sorted(HookRegistry._patched),
    "ours_in_memory": sorted(name for name in sys.modules if name.startswith("hopper_moe")),
}
print(json.dumps(found))
"""


def look(python: Path) -> dict:
    run = subprocess.run([python, "-W", "ignore", "-c", LOOK], capture_output=True, text=True, cwd="/", timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def files(packages: Path) -> dict[str, str]:
    """Digest of every file in site-packages but byte code, which running anything writes."""
    return {
        str(path.relative_to(packages)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in packages.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_uninstalling_leaves_nothing(wheel, tmp_path):  # noqa: F811
    """SGLang is installed for real in a venv of its own; what it needs besides is borrowed from this environment."""
    sglang = f"sglang=={version('sglang')}"
    python = _environment(tmp_path / "venv", ["--link-mode", "hardlink", sglang], without=("sglang-", "sglang/"))
    packages = next((tmp_path / "venv" / "lib").glob("python3.*")) / "site-packages"
    assert (packages / "sglang" / "launch_server.py").exists()
    stock_files, stock = files(packages), look(python)
    assert "hopper_moe" not in (*stock["entry_points"], *stock["choices"], *stock["ours_in_memory"])

    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, "--no-deps", wheel], check=True)
    ours = look(python)
    assert set(ours["entry_points"]) - set(stock["entry_points"]) == {"hopper_moe"}
    assert ours["choices"] == [*stock["choices"], "hopper_moe"] and set(ours["patched"]) > set(stock["patched"])
    installed = files(packages)
    assert {name.split("/")[0].split("-")[0] for name in set(installed) - set(stock_files)} == {"hopper_moe", "sglang_hopper_moe"}
    assert {name: installed[name] for name in stock_files} == stock_files

    subprocess.run([UV, "pip", "uninstall", "--quiet", "--python", python, "sglang-hopper-moe"], check=True)
    assert files(packages) == stock_files
    assert look(python) == stock
