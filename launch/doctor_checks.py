"""The checks of `hopper-moe doctor`. Each returns findings; none raises for a problem that it reports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from hopper_moe.kernels import jit
from hopper_moe.kernels.device import is_sm90
from hopper_moe.launch.machine import GIB, Machine
from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.sglang import seams
from hopper_moe.quantization.errors import Refusal

OK, NOTE, FAIL = "ok", "note", "FAIL"
DISTRIBUTION = "sglang-hopper-moe"
PLUGIN_GROUP = "sglang.srt.plugins"
MIN_CUDA = (12, 0)  # the first toolkit with sm_90a
MIN_DISK_GIB = 2  # a full kernel cache is far smaller; with less, compilers fail with misleading messages


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: a verdict (ok, note, FAIL), the subject, and the finding."""

    verdict: str
    subject: str
    text: str


def python_version() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Finding(OK if sys.version_info >= (3, 11) else FAIL, "python", f"{version} (3.11 or newer is needed)")


def torch_version() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return _ranged("torch", f"{torch.__version__}, {build}", Version(torch.__version__.split("+")[0]))


def gpus(machine: Machine) -> list[Finding]:
    if not machine.gpus:
        why = f"driver {machine.driver}, but torch sees no device" if machine.driver else "no NVIDIA driver"
        return [Finding(FAIL if machine.driver else NOTE, "gpu", f"none ({why}): the fused kernels need a Hopper GPU")]
    findings = [Finding(OK, "driver", machine.driver or "unknown")]
    for gpu in machine.gpus:
        text = (
            f"{gpu.index}: {gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.num_sms} SMs, "
            f"{gpu.memory_bytes / GIB:.0f} GiB HBM, {gpu.free_bytes / GIB:.0f} GiB free, "
            f"{gpu.nvlinks}"
        )
        hopper = is_sm90(gpu.capability)
        findings.append(
            Finding(OK if hopper else NOTE, "gpu", text if hopper else f"{text}; not Hopper, the fused kernels do not run")
        )
    return findings


def peers(machine: Machine) -> list[Finding]:
    if len(machine.gpus) < 2:
        return []
    if machine.blocked_peers:
        pairs = ", ".join(f"{i}->{j}" for i, j in machine.blocked_peers)
        return [Finding(NOTE, "peers", f"no direct access {pairs}: expert parallel needs GPUs that reach each other")]
    return [Finding(OK, "peers", f"all {len(machine.gpus)} GPUs reach each other's memory")]


def compiler(machine: Machine) -> Finding:
    try:
        path = jit.find_nvcc()
        said = jit.toolkit(path)
    except Refusal as refusal:
        return Finding(FAIL if machine.is_hopper else NOTE, "compiler", str(refusal))
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return Finding(
            FAIL if machine.is_hopper else NOTE, "compiler", f"{path} does not say its version: install the CUDA toolkit again"
        )
    version = tuple(int(part) for part in release.groups())
    text = f"{path}, CUDA {version[0]}.{version[1]}"
    if version < MIN_CUDA:
        return Finding(
            FAIL if machine.is_hopper else NOTE, "compiler", f"{text}; sm_90a needs {MIN_CUDA[0]}.{MIN_CUDA[1]} or newer"
        )
    return Finding(OK, "compiler", text)


def compiled() -> list[Finding]:
    """Which kernel libraries the cache holds, for exactly these sources, flags and compiler."""
    try:
        paths = {name: jit.library_path(library) for name, library in jit.LIBRARIES.items()}
    except (Refusal, ImportError):  # no working compiler or no tvm-ffi, which earlier lines report
        return []
    return [
        Finding(OK, "kernels", f"{name} is {'compiled' if path.exists() else 'not compiled yet: happens once, at first use'}")
        for name, path in paths.items()
    ]


def sglang() -> list[Finding]:
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return [Finding(NOTE, "sglang", "not installed: pip install 'sglang-hopper-moe[sglang]' to serve on a Hopper GPU")]
    try:
        seams.require_supported(version)
    except Refusal as refusal:
        return [Finding(FAIL, "sglang", str(refusal))]
    return [_ranged("sglang", version, Version(version)), _seams()]


def _seams() -> Finding:
    """Whether every API of the installed SGLang that the plugin patches is as pinned."""
    places = {**seams.LAUNCHER, **seams.WORKER}
    with warnings.catch_warnings():  # SGLang's modules warn about GPUs that this check does not need
        warnings.simplefilter("ignore")
        problems = seams.check(places)
    if problems:
        return Finding(FAIL, "sglang", f"the plugin's hooks do not fit: {'; '.join(problems)}")
    return Finding(OK, "sglang", f"all {len(places)} places where the plugin hooks in look as in {seams.VERSION}")


def plugin() -> Finding:
    names = [point.name for point in importlib.metadata.entry_points(group=PLUGIN_GROUP)]
    if "hopper_moe" not in names:
        return Finding(
            FAIL, "plugin", f"entry point hopper_moe of group {PLUGIN_GROUP} is not visible: install {DISTRIBUTION} with pip"
        )
    wanted = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if wanted and "hopper_moe" not in wanted:
        return Finding(FAIL, "plugin", f"SGLANG_PLUGINS={','.join(wanted)} leaves out hopper_moe: add it or unset SGLANG_PLUGINS")
    return Finding(OK, "plugin", f"entry point hopper_moe is visible, {DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}")


def cpu_host() -> Finding:
    missing = [name for name in ("transformers", "accelerate", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(NOTE, "cpu host", f"lacks {', '.join(missing)}: pip install 'sglang-hopper-moe[host]' to serve on the CPU")
    return Finding(OK, "cpu host", f"transformers {importlib.metadata.version('transformers')}")


def third_party_kernels() -> Finding:
    """Check that `import kernels` does not find our folder: transformers looks for a package of that name."""
    spec = importlib.util.find_spec("kernels")
    ours = Path(__file__).resolve().parent.parent / "kernels"
    if spec and spec.submodule_search_locations and ours in [Path(place).resolve() for place in spec.submodule_search_locations]:
        return Finding(FAIL, "imports", f"`import kernels` gives {ours}: leave that checkout's folder off PYTHONPATH")
    return Finding(OK, "imports", "`import kernels` is not ours")


def cache(settings: Settings) -> Finding:
    folder = settings.cache_dir
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    text = f"{folder}, {free:.0f} GiB free on its disk"
    if not os.access(existing, os.W_OK):
        return Finding(FAIL, "cache", f"{text}, not writable: set HOPPER_MOE_CACHE_DIR")
    return Finding(OK if free >= MIN_DISK_GIB else FAIL, "cache", text)


def _ranged(name: str, text: str, version: Version) -> Finding:
    """Judge a version by the range that our own metadata declares for it."""
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.name == name:
            tested = requirement.specifier.contains(version, prereleases=True)
            return Finding(
                OK if tested else NOTE, name, text if tested else f"{text}; outside the tested range {requirement.specifier}"
            )
    raise LookupError(f"{DISTRIBUTION} declares no range for {name}")
