"""The compiler's word on the kernels, and the cache that many processes share. Needs nvcc, no GPU."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from hopper_moe.kernels import jit, mega_moe
from hopper_moe.kernels.build import buildable, main
from hopper_moe.launch import doctor_checks
from hopper_moe.launch.cli import main as hopper_moe
from hopper_moe.launch.machine import Machine
from hopper_moe.moe_backends import startup
from hopper_moe.moe_backends.base import ExpertShard
from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.moe_backends.registry import REGISTRY
from hopper_moe.quantization import layout

# The bar is 0 and mega_moe_kernel does not meet it: it spills outside its product loops (most of it behind a pass of a pair, once
# in 64 chunks) and, FP4, in the widest L2 loop: 2 stores and 2 loads of 358 instructions. (A kernel that spilled 240 bytes, none
# there, was slower.) The bounds only keep it from growing.
MAX_SPILL_BYTES = {
    "mega_moe": {"pre_dispatch_kernel": 0, "give_up": 0, "mega_moe_kernelILb0E": 1104, "mega_moe_kernelILb1E": 1148},
    "fp8_mega": {"pre_dispatch_kernel": 0, "give_up": 0, "mega_moe_kernelILb0E": 140, "mega_moe_kernelILb1E": 204},
}
FUNCTION = re.compile(r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# hidden, intermediate, top_k, experts, local, first, ranks, rank, capacity, wave rows, FP8 combine, FP4 dispatch
FLASH_RANK = [4096, 2048, 6, 256, 32, 64, 8, 2, 512, 4096, 1, 1]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    there = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
    assert there, "these tests compile the kernels: install nvcc of CUDA 13"


@pytest.fixture(scope="module", params=MAX_SPILL_BYTES)
def library(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def report(library) -> str:
    return jit.compile_report(library)


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A copy of the CUDA sources that may be changed, and an empty cache: `jit` works on these."""
    copy = tmp_path / "csrc"
    shutil.copytree(jit.SOURCE_DIR, copy)
    monkeypatch.setattr(jit, "SOURCE_DIR", copy)
    monkeypatch.setenv("HOPPER_MOE_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    yield copy
    monkeypatch.undo()
    settings.cache_clear()


def test_products_stay_asynchronous(report):
    """C7510 ff.: WGMMA serialised; C7508: setmaxnreg ignored. Both cost most of the kernel's speed without any error."""
    assert "Compiling entry function" in report, report
    assert not re.findall(r".*C75\d\d.*", report), report
    assert "setmaxnreg" not in report, report


def test_sources_compile_without_warnings(report):
    assert not re.findall(r".*warning.*", report, re.IGNORECASE), report


def test_spilled_bytes(library, report):
    spilled, bounds = {}, MAX_SPILL_BYTES[library]
    for mangled, stores, loads in FUNCTION.findall(report):
        name = next((kernel for kernel in bounds if kernel in mangled), mangled)
        spilled[name] = int(stores)
        print(f"{name}: {stores} bytes spilled, {loads} bytes of reloads")
    assert spilled.keys() == bounds.keys(), "a kernel is missing from the report, or has no bound here"
    for name, bound in bounds.items():
        assert spilled[name] <= bound, f"{name} spills {spilled[name]} bytes, above {bound}"


def test_the_key_depends_on_sources_flags_and_layout(sources, monkeypatch):
    library = jit.LIBRARIES["mega_moe"]
    keys = [jit.cache_key(library)]
    assert jit.cache_key(library) == keys[0]
    keys.append(jit.cache_key(jit.LIBRARIES["fp8_mega"]))  # same source, other weights
    header = sources / "ptx" / "memory.cuh"
    header.write_bytes(header.read_bytes() + b"\n")
    keys.append(jit.cache_key(library))
    monkeypatch.setattr(jit, "FLAGS", (*jit.FLAGS, "-lineinfo"))
    keys.append(jit.cache_key(library))
    monkeypatch.setattr(layout, "H_GROUP", 2 * layout.H_GROUP)
    keys.append(jit.cache_key(library))
    (sources / "extra.cuh").write_text("")
    keys.append(jit.cache_key(library))
    assert len(set(keys)) == len(keys), "a change did not change the key"


def test_a_broken_source_says_why_and_leaves_nothing(sources):
    (sources / "bindings.cu").write_text("int broken() { return no_such_name; }\n")
    for compile_it in (jit.build, jit.compile_report):
        with pytest.raises(Refusal, match="could not compile bindings.cu .*no_such_name"):
            compile_it("mega_moe")
    assert list(settings().cache_dir.iterdir()) == []


@pytest.fixture
def broken_nvcc(tmp_path, monkeypatch) -> Path:
    """An nvcc, first on PATH, that fails whatever it is asked."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho first words >&2\necho libcicc.so is missing >&2\nexit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")
    return nvcc


@pytest.mark.parametrize("command", [("list",), ("build", "mega_moe")])
def test_commands_say_in_one_line_that_the_compiler_is_broken(command, broken_nvcc):
    done = CliRunner().invoke(hopper_moe, ["kernels", *command])
    assert done.exit_code == 2, done.exception
    line = done.stderr.splitlines()[-1]
    assert f"`{broken_nvcc} --version` failed" in line and "exit code 3" in line and "libcicc.so is missing" in line
    assert doctor_checks.compiled() == [] and "libcicc.so" in doctor_checks.compiler(Machine()).text


def test_build_says_in_one_line_that_a_source_does_not_compile(sources):
    (sources / "bindings.cu").write_text("int broken() { return no_such_name; }\n")
    done = CliRunner().invoke(hopper_moe, ["kernels", "build", "mega_moe"])
    assert done.exit_code == 2, done.exception
    assert "could not compile bindings.cu" in done.stderr.splitlines()[-1] and "no_such_name" in done.stderr.splitlines()[-1]


def test_commands_compile_once_and_say_where(sources):
    def kernels(*command: str) -> str:
        return CliRunner().invoke(main, command, catch_exceptions=False).output

    assert re.search(r"fp8_mega: .*not compiled", kernels("list"))
    assert re.search(r"fp8_mega: .*compiled in \d+ s", kernels("build", "fp8_mega"))
    assert "was there" in kernels("build", "fp8_mega")
    path = jit.library_path(jit.LIBRARIES["fp8_mega"])
    assert path.is_relative_to(settings().cache_dir) and path.exists()
    assert re.search(rf"{path} \(\d+ KiB\)", kernels("list"))


def test_flashinfers_library_is_listed_and_named():
    """`build` without names compiles it too; here its cache only is looked at, since that takes the better part of an hour."""
    listed = CliRunner().invoke(main, ["list"], catch_exceptions=False).output
    assert re.search(r"flashinfer: .*fused_moe_90.so", listed)
    assert set(buildable()) == {*jit.LIBRARIES, "flashinfer"}


def test_racing_processes_share_one_library(tmp_path):
    """Two processes find an empty cache at the same time; both end with a working library, and with the same one."""
    script = (
        "from hopper_moe.kernels import jit; "
        f"print(jit.library_path(jit.LIBRARIES['fp8_mega']), list(jit.load('fp8_mega')['workspace_layout']({FLASH_RANK})))"
    )
    environment = {**os.environ, "HOPPER_MOE_CACHE_DIR": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=tmp_path, **pipes) for _ in range(2)]
    said = [racer.communicate(timeout=300) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], said
    assert said[0][0] == said[1][0] and said[0][0].strip()
    (folder,) = (tmp_path / "cache").iterdir()  # no second folder, no left-over of the slower one
    assert [path.name for path in folder.iterdir()] == ["fp8_mega.so"]


def test_workspace_layout():
    """What the library says of its own memory: every field of the Python side, in order, in the map's sizes."""
    fields = list(map(int, jit.load("mega_moe")["workspace_layout"](FLASH_RANK)))
    assert len(fields) == len(mega_moe._WORKSPACE_FIELDS)
    at = dict(zip(mega_moe._WORKSPACE_FIELDS, fields, strict=True))
    in_order = [offset for name, offset in at.items() if name != "control_bytes"]
    assert all(low < high for low, high in pairwise(in_order)) and all(offset % 1024 == 0 for offset in fields)
    assert at["next_task"] < at["control_bytes"] == at["slot_list"]
    hidden, intermediate, top_k, num_experts, _, _, _, _, capacity, wave_rows, _, _ = FLASH_RANK
    assert at["x_exponent"] - at["x"] == capacity * hidden // 2  # FP4
    assert at["x_scale"] - at["x_exponent"] == capacity * hidden // 32
    assert at["combine_scale"] - at["combine"] == capacity * top_k * hidden  # FP8
    assert at["pool_x"] - at["combine_scale"] == 4 * capacity * top_k * hidden // 128
    assert at["x"] - at["slot_list"] == 4 * num_experts * capacity * top_k
    assert at["pool_h_scale"] - at["pool_h"] == (wave_rows + 128) * intermediate, "pools hold a wave, not all ranks' tokens"
    plain = dict(zip(mega_moe._WORKSPACE_FIELDS, jit.load("mega_moe")["workspace_layout"]([*FLASH_RANK[:-2], 0, 0]), strict=True))
    assert plain["x_scale"] - plain["x"] == capacity * hidden
    assert plain["pool_x"] - plain["combine"] == 2 * capacity * top_k * hidden


def test_buffer_of_eight_ranks_stays_under_a_gibibyte():
    """Flash, 8192 tokens a rank: the issue's bound; the pools do not grow with the ranks."""
    flash = {"hidden_size": 4096, "intermediate_size": 2048, "num_experts": 256, "top_k": 6, "num_tokens_capacity": 8192}
    sizes = {n: mega_moe.workspace_bytes(**flash, num_local_experts=256 // n, num_ranks=n) for n in (2, 4, 8)}
    print({n: f"{size / 2**30:.2f} GiB" for n, size in sizes.items()})
    assert sizes[8] < 2**30
    fp8 = mega_moe.workspace_bytes(**flash, num_local_experts=32, num_ranks=8, fp8_combine=True)
    assert 0.15 * 2**30 < sizes[8] - fp8 < 0.2 * 2**30, "half the combine slots, less their scales"


def test_the_start_up_block_tells_the_exchange_buffer():
    """What is logged is what `MegaMoE` will take: with a group the buffer of its ranks, with the options that are on."""
    shard = ExpertShard(256, 32, 32, 6, 4096, 2048, 10.0, 8192, group=object(), fp8_combine=True)
    flash = {"hidden_size": 4096, "intermediate_size": 2048, "num_experts": 256, "top_k": 6, "num_tokens_capacity": 8192}
    for name in ("mxfp4_mega", "fp8_mega"):
        told = startup.workspace_bytes(REGISTRY[name], shard)
        assert told == mega_moe.workspace_bytes(**flash, num_local_experts=32, num_ranks=8, fp8_combine=True)
        assert told != startup.workspace_bytes(REGISTRY[name], replace(shard, group=None))
    assert startup.workspace_bytes(REGISTRY["w4a16"], shard) == 0


def test_limits_are_the_kernels_own():
    source = (jit.SOURCE_DIR / "layout.cuh").read_text()
    assert int(re.search(r"kMaxExperts = (\d+);", source)[1]) == mega_moe.MAX_EXPERTS
