"""Environment variables: values, older names, where each value came from, and the README's table of them."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hopper_moe.kernels import cache_dir
from hopper_moe.kernels.home import ensure_home
from hopper_moe.moe_backends import env
from hopper_moe.moe_backends.env_table import LEGACY_ALWAYS_ON, LEGACY_SWITCHES, VARIABLES
from hopper_moe.moe_backends.kernel_specs import KERNELS
from hopper_moe.quantization.errors import Refusal

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
            assert not found or path.name in ("env.py", "env_table.py", "cache_dir.py"), f"{path}: {found[0]}"


@pytest.mark.parametrize(
    "name, hint", [("HOPPER_MOE_KERNL", "did you mean HOPPER_MOE_KERNEL?"), ("HOPPER_MOE_BOGUS", "`hopper-moe env` lists them.")]
)
def test_unknown_name_is_refused_with_a_hint(name, hint):
    with pytest.raises(Refusal) as refused:
        env.load({name: "auto"})
    assert str(refused.value) == f"{name} is set, but no such variable exists: {hint}"


SERVICE_LINKS = {
    "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "30000", "SERVICE_PORT_HTTP": "30000", "PORT": "tcp://10.0.0.1:30000",
    "PORT_30000_TCP": "tcp://10.0.0.1:30000", "PORT_30000_TCP_ADDR": "10.0.0.1", "PORT_30000_TCP_PORT": "30000",
    "PORT_30000_TCP_PROTO": "tcp", "PORT_53_UDP": "udp://10.0.0.1:53", "PORT_9_SCTP_PROTO": "sctp",
    "NAME": "/client/hopper-moe", "ENV_PATH": "/bin",
}  # fmt: skip


@pytest.mark.parametrize("service", ["", "ROUTER_", "KERNEL_", "V4_FLASH_2_"])
def test_service_links_stop_nothing_and_mean_nothing(service):
    """H1: what Kubernetes and Docker set beside a service called hopper-moe, or hopper-moe-router."""
    links = {f"HOPPER_MOE_{service}{name}": value for name, value in SERVICE_LINKS.items()}
    assert env.load(links) == env.load({})


@pytest.mark.parametrize(
    "name", ["KERNEL_", "KERNEL_NAME", "PORTS", "PORT_X", "SERVICE", "TIMEOUT", "CACHEDIR", "CACHE_DIR_PORT_TCP", "MAX_TOKENS"]
)
def test_misspelt_variables_are_still_refused_beside_service_links(name):
    links = {f"HOPPER_MOE_{link}": value for link, value in SERVICE_LINKS.items()}
    with pytest.raises(Refusal, match=f"HOPPER_MOE_{name} is set, but no such variable exists"):
        env.load({**links, f"HOPPER_MOE_{name}": "1"})


BARE = [
    *[(["env"], {"HOME": home} if home else {}) for home in ("", "/", "/nonexistent")],
    *[(command, {}) for command in (["kernels", "list"], ["kernels", "table"], ["demo", "--help"])],
    (["doctor"], {"HOME": "/"}),
]
BARE_USER = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
BARE_USER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can become another user")
@pytest.mark.parametrize("command, home", BARE, ids=str)
def test_commands_work_for_a_user_without_passwd_entry_or_home(command, home):
    """H21: an empty environment, and a user id that no passwd entry knows (which may read this checkout, but write nowhere)."""
    hopper_moe = Path(sys.executable).with_name("hopper-moe")
    done = subprocess.run(
        [*BARE_USER, hopper_moe, *command],
        env={"PATH": "/usr/bin:/bin", **home},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.returncode in ((0, 1) if command == ["doctor"] else (0,)), done.stdout + done.stderr
    if command == ["env"]:
        assert "HOPPER_MOE_CACHE_DIR = /tmp/hopper_moe-54321" in done.stdout
        assert len(re.findall("set HOME to|set HOPPER_MOE_CACHE_DIR to", done.stderr)) == 1, done.stderr


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can become another user")
def test_the_plugin_registers_for_a_user_without_passwd_entry_or_home():
    """H21 at the other door: SGLang's own loading of plugins. SGLang itself needs to be told where its caches are."""
    program = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES as choices\n"
        "print('registered', 'hopper_moe' in choices)"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as caches:
        os.chmod(caches, 0o777)
        environ = {"PATH": "/usr/bin:/bin", "SGLANG_CACHE_DIR": caches}
        command = [*BARE_USER, sys.executable, "-W", "ignore", "-c", program]
        done = subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True, timeout=300)
    assert "registered True" in done.stdout and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "user id 54321 has no home folder: HOME is /tmp/hopper_moe-54321/home for this process" in done.stderr


def test_a_home_that_cannot_be_written_is_replaced_and_its_models_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_dir.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for name in ("HF_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    ensure_home()
    assert os.environ["HOME"] == str(home) and "HF_HOME" not in os.environ
    writable = cache_dir.can_write
    monkeypatch.setattr(cache_dir, "can_write", lambda folder: folder != home and writable(folder))
    ensure_home()
    try:
        assert os.environ["HOME"] == str(tmp_path / "tmp" / f"hopper_moe-{os.getuid()}" / "home")
        assert os.environ["HF_HOME"] == str(home / ".cache" / "huggingface") and "MODELSCOPE_CACHE" not in os.environ
    finally:
        os.environ.pop("HF_HOME", None)


def test_a_home_with_a_missing_or_false_tmpdir(tmp_path):
    program = "from hopper_moe.kernels import cache_dir; print(cache_dir.cache_dir())"
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path / "none")}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / ".cache" / "hopper_moe"), done.stderr


def test_a_read_only_cache_is_no_error_until_something_must_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_dir.os, "access", lambda path, mode: not mode & os.W_OK)
    assert env.load({"HOPPER_MOE_CACHE_DIR": str(tmp_path)}).cache_dir == tmp_path
    with pytest.raises(Refusal, match=f"{tmp_path} cannot be written by this user: set HOPPER_MOE_CACHE_DIR"):
        cache_dir.make(tmp_path)


def test_a_fallback_folder_of_somebody_else_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_dir, "fallback_dir", lambda: tmp_path / "theirs")
    (tmp_path / "theirs").mkdir(mode=0o755)
    (tmp_path / "theirs").chmod(0o777)
    assert not cache_dir.is_trusted(tmp_path / "theirs")
    with pytest.raises(Refusal, match="can be written by others"):
        cache_dir.make(tmp_path / "theirs")
    (tmp_path / "theirs").chmod(0o700)
    assert cache_dir.is_trusted(tmp_path / "theirs")
