"""Runs `tests/stock_sglang` in a process of its own, and SGLang without our plugin in another."""

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

HERE = Path(__file__).resolve().parent / "stock_sglang"
AT_LEAST = 120  # tests that must have run: nothing may be skipped away


def environment(**changes: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HOPPER_MOE_", "_HOPPER_MOE_", "SGLANG_", "DG_"))
    }
    small = {"SGLANG_OPT_FUSE_MHC_POST_PRE": "0"}  # for hidden sizes of test models: moe_backends/sglang/hyper_connections.py
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"} | small | changes


def test_in_stock_sglang(seed_block, pytestconfig, tmp_path):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", f"--junitxml={report}", str(HERE)]
    if many := pytestconfig.getoption("seeds"):
        command += [f"--first-seed={seed_block[0]}", f"--seeds={len(seed_block)}"]
    if count := pytestconfig.getoption("cases"):
        command += [f"--cases={count}"]
    run = subprocess.run(
        command,
        cwd=HERE,
        env=environment(STOCK_SGLANG="1", PYTHONPATH=os.pathsep.join((str(HERE), str(HERE.parent)))),
        capture_output=True,
        text=True,
        timeout=7200 if many else 600,
    )
    suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    assert run.returncode == 0 and suite is not None, run.stdout[-8000:] + run.stderr[-2000:]
    counts = {name: int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors")}
    assert counts["tests"] >= (len(seed_block) if many else AT_LEAST) and not counts["skipped"], counts


def test_without_the_plugin_everything_refuses(tmp_path):
    sys.path.insert(0, str(HERE))
    import stock

    model = stock.write_model(tmp_path / "model")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "without_plugin.py"), str(model)],
        env=environment(
            STOCK_SGLANG="1", SGLANG_PLUGINS="somebody_elses", PYTHONPATH=os.pathsep.join((str(HERE), str(HERE.parent)))
        ),
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
