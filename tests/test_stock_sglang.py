"""Runs `tests/stock_sglang` in one process per SGLang version, and SGLang without our plugin in another."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import distribution
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "stock_sglang"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hopper_moe_tests"
UV = Path(sys.executable).with_name("uv")

# 0.5.17 as its own metadata pins it, as far as importing it needs; torch and the rest are this environment's.
OLD = ("sglang==0.5.17", "transformers==5.12.1", "tokenizers==0.22.2")

# (version, tests that must have run at least): nothing may be skipped away.
SUITES = [("0.5.23", 120), ("0.5.17", 16)]


def environment(**changes: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HOPPER_MOE_", "_HOPPER_MOE_", "SGLANG_", "DG_"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"} | changes


def old_sglang() -> Path:
    """The 0.5.17 wheel in a folder of its own, downloaded once. Fails without it."""
    folder = CACHE / "-".join(name.replace("==", "_") for name in OLD)
    if not (folder / "complete").exists():
        subprocess.run(
            [UV, "pip", "install", "--quiet", "--python", sys.executable, "--target", folder, "--no-deps", *OLD], check=True
        )
        (folder / "complete").touch()
    return folder


@pytest.mark.parametrize(("version", "at_least"), SUITES, ids=[version for version, _ in SUITES])
def test_in_stock_sglang(version, at_least, tmp_path):
    path = [str(HERE)] + ([str(old_sglang())] if version == "0.5.17" else [])
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", f"--junitxml={report}", str(HERE)]
    run = subprocess.run(
        command,
        cwd=HERE,
        env=environment(STOCK_SGLANG=version, PYTHONPATH=os.pathsep.join(path)),
        capture_output=True,
        text=True,
        timeout=600,
    )
    suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    assert run.returncode == 0 and suite is not None, run.stdout[-8000:] + run.stderr[-2000:]
    counts = {name: int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors")}
    assert counts["tests"] >= at_least and not counts["skipped"], counts
    print(f"SGLang {version}: {counts}")


def test_without_the_plugin_everything_refuses(tmp_path):
    sys.path.insert(0, str(HERE))
    import stock

    model = stock.write_model(tmp_path / "model")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "without_plugin.py"), str(model)],
        env=environment(STOCK_SGLANG="0.5.23", SGLANG_PLUGINS="somebody_elses", PYTHONPATH=str(HERE)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["parser"].startswith("exit 2: ") and "invalid choice: 'hopper_moe'" in found["parser"]
    assert "neither built in nor registered" in found["worker"]
    assert found["quant_method"] == "Fp8MoEMethod"


def test_sglang_itself_is_untouched():
    """Everything above ran the plugin; SGLang's files still are what its wheel installed, so uninstalling ours leaves it as it
    was."""
    changed = []
    for file in distribution("sglang").files:
        if file.suffix == ".py" and file.hash is not None:
            digest = hashlib.new(file.hash.mode, file.locate().read_bytes()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                changed.append(str(file))
    assert not changed
    ours = [file for file in distribution("sglang").files if "hopper_moe" in str(file)]
    assert not ours
