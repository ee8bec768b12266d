"""Environment variables: values, older names, where each value came from, and the README's table of them."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hopper_moe.moe_backends import env
from hopper_moe.moe_backends.env_table import KERNELS, LEGACY_ALWAYS_ON, LEGACY_SWITCHES, VARIABLES
from hopper_moe.moe_backends.errors import Refusal

ROOT = Path(__file__).resolve().parent.parent


def test_defaults():
    settings = env.load({"PATH": "/bin", "_HOPPER_MOE_NOTE": "private"})
    assert (settings.kernel, settings.allowed_kernels, settings.max_tokens_per_rank) == ("auto", KERNELS, None)
    assert (settings.fp8_combine, settings.fp4_dispatch, settings.timeout_s) == (False, False, 300)
    assert settings.cache_dir.name == "hopper_moe" and settings.cache_dir.is_absolute()
    assert set(settings.sources.values()) == {"default"} and settings.translations == ()


@pytest.mark.parametrize(
    "name, text, field, value",
    [
        *[("HOPPER_MOE_KERNEL", kernel, "kernel", kernel) for kernel in ("auto", *KERNELS)],
        ("HOPPER_MOE_MAX_TOKENS_PER_RANK", "1", "max_tokens_per_rank", 1),
        ("HOPPER_MOE_MAX_TOKENS_PER_RANK", "262144", "max_tokens_per_rank", 262144),
        ("HOPPER_MOE_FP8_COMBINE", "True", "fp8_combine", True),
        ("HOPPER_MOE_FP4_DISPATCH", "yes", "fp4_dispatch", True),
        ("HOPPER_MOE_FP4_DISPATCH", "n", "fp4_dispatch", False),
        ("HOPPER_MOE_TIMEOUT_S", "3600", "timeout_s", 3600),
    ],
)
def test_own_value(name, text, field, value):
    settings = env.load({name: text})
    assert getattr(settings, field) == value and settings.sources[field] == "environment"


def test_cache_dir(tmp_path, monkeypatch):
    assert env.load({"HOPPER_MOE_CACHE_DIR": str(tmp_path / "new")}).cache_dir == tmp_path / "new"
    assert not (tmp_path / "new").exists(), "reading a setting must not create anything"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.load({}).cache_dir == tmp_path / "hopper_moe"


@pytest.mark.parametrize(
    "name, text, field, value",
    [
        ("SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK", "4096", "max_tokens_per_rank", 4096),
        ("DG_USE_FP8_COMBINE", "1", "fp8_combine", True),
        ("DG_USE_FP4_ACTS", "1", "fp4_dispatch", True),
    ],
)
def test_older_name_is_translated(name, text, field, value):
    settings = env.load({name: text})
    assert getattr(settings, field) == value and settings.sources[field] == name
    assert settings.translations == (f"{name}={text} is read as HOPPER_MOE_{field.upper()}={text}.",)
    own = next(variable.name for variable in VARIABLES if variable.field == field)
    both = env.load({name: text, own: "true" if value is True else text})  # the same value under both names is no contradiction
    assert getattr(both, field) == value and both.sources[field] == "environment"


@pytest.mark.parametrize(
    "environ, allowed",
    [
        ({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "1"}, ("mxfp4_mega", "fp8_mega", "reference")),
        ({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "0"}, ("w4a16", "reference")),
        ({"SGLANG_DSV4_FP4_EXPERTS": "1"}, ("mxfp4_mega", "w4a16", "reference")),
        ({"SGLANG_DSV4_FP4_EXPERTS": "0"}, ("fp8_mega",)),
        ({"SGLANG_DSV4_FP4_DEQUANT": "1"}, ("fp8_mega",)),
        ({"SGLANG_DSV4_FP4_DEQUANT": "0"}, KERNELS),
        ({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "1", "SGLANG_DSV4_FP4_EXPERTS": "1"}, ("mxfp4_mega", "reference")),
        ({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "1", "SGLANG_DSV4_FP4_DEQUANT": "1"}, ("fp8_mega",)),
        ({"HOPPER_MOE_KERNEL": "mxfp4_mega", "SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "1"}, ("mxfp4_mega",)),
        ({"SGLANG_OPT_FIX_MEGA_MOE_MEMORY": "1"}, KERNELS),
    ],
)
def test_older_switches_narrow_the_kernel(environ, allowed):
    settings = env.load(environ)
    assert settings.allowed_kernels == allowed
    older = [name for name in environ if not name.startswith("HOPPER_MOE_")]
    assert len(settings.translations) == len(older) and all(
        any(line.startswith(name) for line in settings.translations) for name in older
    )


def test_translations_are_logged_once(monkeypatch, caplog):
    monkeypatch.setenv("DG_USE_FP8_COMBINE", "0")
    env.settings.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="hopper_moe"):
            env.settings(), env.settings()
    finally:
        env.settings.cache_clear()
    assert [record.getMessage() for record in caplog.records] == ["DG_USE_FP8_COMBINE=0 is read as HOPPER_MOE_FP8_COMBINE=0."]


def test_command_prints_every_variable_value_and_source(tmp_path):
    environ = {
        **{name: value for name, value in os.environ.items() if "MOE" not in name and not name.startswith(("DG_", "SGLANG_"))},
        "HOPPER_MOE_TIMEOUT_S": "77",
        "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK": "512",
    }
    command = Path(sys.executable).with_name("hopper-moe")
    shown = subprocess.run([command, "env"], env=environ, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "HOPPER_MOE_TIMEOUT_S = 77   [environment]" in shown
    assert "HOPPER_MOE_MAX_TOKENS_PER_RANK = 512   [SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK]" in shown
    assert "HOPPER_MOE_KERNEL = auto   [default]" in shown
    for variable in VARIABLES:
        assert f"{variable.name} = " in shown and variable.meaning in shown
    for name in (*[switch.name for switch in LEGACY_SWITCHES], LEGACY_ALWAYS_ON):
        assert f"{name} = unset" in shown


def test_readme_documents_every_variable():
    readme = (ROOT / "README.md").read_text()
    for variable in VARIABLES:
        row = next((line for line in readme.splitlines() if line.startswith(f"| `{variable.name}`")), None)
        assert row, f"README.md has no table row for {variable.name}"
        assert variable.meaning in row and variable.values.replace(" | ", ", ") in row
        assert (variable.legacy or "") in row
    for name in (*[switch.name for switch in LEGACY_SWITCHES], LEGACY_ALWAYS_ON):
        assert f"`{name}`" in readme


def test_no_other_module_reads_the_environment_for_a_setting():
    """One typed module: elsewhere nobody may look HOPPER_MOE_* or the older names up."""
    names = [variable.name for variable in VARIABLES] + [variable.legacy for variable in VARIABLES if variable.legacy]
    names += [switch.name for switch in LEGACY_SWITCHES] + [LEGACY_ALWAYS_ON]
    read = re.compile(r"(?:environ(?:\.get|\.pop)?|getenv)\s*[\[(]\s*[\"'](?:" + "|".join(names) + r")[\"'](?!\]\s*=[^=])")
    assert read.search('os.environ.get("HOPPER_MOE_KERNEL")') and not read.search('environ["HOPPER_MOE_KERNEL"] = "reference"')
    for folder in ("moe_backends", "quantization", "kernels", "eval", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            found = read.search(path.read_text())
            assert not found or path.name in ("env.py", "env_table.py"), f"{path}: {found[0]}"


@pytest.mark.parametrize(
    "name, hint", [("HOPPER_MOE_KERNL", "did you mean HOPPER_MOE_KERNEL?"), ("HOPPER_MOE_BOGUS", "`hopper-moe env` lists them.")]
)
def test_unknown_name_is_refused_with_a_hint(name, hint):
    with pytest.raises(Refusal) as refused:
        env.load({name: "auto"})
    assert str(refused.value) == f"{name} is set, but no such variable exists: {hint}"
