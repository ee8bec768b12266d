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

from hopper_moe.kernels import jit, w4a16, workspace
from hopper_moe.kernels.benchmarks.workload import SHAPES
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.launch import doctor_checks
from hopper_moe.launch.cli import main as hopper_moe
from hopper_moe.launch.kernels_cli import buildable, main
from hopper_moe.launch.machine import Machine
from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.kernel_specs import REGISTRY
from hopper_moe.moe_backends.sglang import startup
from hopper_moe.quantization import layout
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts

# The bar is 0 and mega_moe_kernel does not meet it: it spills outside its product loops (most of it behind a pass of a pair, once
# in 64 chunks) and, FP4, in the widest L2 loop: 2 stores and 2 loads of 358 instructions. (A kernel that spilled 240 bytes, none
# there, was slower.) The bounds only keep it from growing.
MAX_SPILL_BYTES = {
    "mxfp4_mega": {"pre_dispatch_kernel": 0, "give_up": 0, "mega_moe_kernelILb0E": 1104, "mega_moe_kernelILb1E": 1148},
    "mxfp4_wide": {"pre_dispatch_kernel": 0, "give_up": 0, "mega_moe_kernelILb0E": 1144, "mega_moe_kernelILb1E": 1200},
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
    library, other = list(jit.LIBRARIES.values())[:2]
    keys = [jit.cache_key(library)]
    assert jit.cache_key(library) == keys[0]
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", "")
        elsewhere.setenv("CUDA_HOME", "/nonexistent")
        assert jit.cache_key(library) == keys[0], "the key needs no compiler"
    keys.append(jit.cache_key(other))  # same source, other weights
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


def test_an_older_tvm_ffi_is_refused_and_a_newer_one_keeps_the_key(monkeypatch):
    library = next(iter(jit.LIBRARIES.values()))
    key = jit.cache_key(library)
    monkeypatch.setattr(jit.importlib.metadata, "version", lambda name: "0.1.13")
    assert jit.cache_key(library) == key
    monkeypatch.setattr(jit.importlib.metadata, "version", lambda name: "0.1.5")
    with pytest.raises(Refusal, match="apache-tvm-ffi 0.1.5 is older than 0.1.11: pip install"):
        jit.cache_key(library)


def test_a_broken_source_says_why_and_leaves_nothing(sources):
    (sources / "bindings.cu").write_text("int broken() { return no_such_name; }\n")
    for compile_it in (jit.build, jit.compile_report):
        with pytest.raises(Refusal, match="could not compile bindings.cu .*no_such_name"):
            compile_it(next(iter(jit.LIBRARIES)))
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


def test_commands_say_in_one_line_that_the_compiler_is_broken(broken_nvcc, sources):
    done = CliRunner().invoke(hopper_moe, ["kernels", "build", *list(jit.LIBRARIES)[:1]])
    assert done.exit_code == 2, done.exception
    line = done.stderr.splitlines()[-1]
    assert f"{broken_nvcc} could not compile" in line and "exit code 3" in line and "libcicc.so is missing" in line
    assert "libcicc.so" in doctor_checks.compiler(Machine()).text


@pytest.fixture
def no_nvcc(monkeypatch) -> None:
    """A machine without any compiler."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")


@pytest.mark.parametrize("name", jit.LIBRARIES)
def test_without_a_compiler_the_sentence_names_the_folders_and_leads_out(name, sources, no_nvcc, tmp_path):
    with pytest.raises(Refusal) as refused:
        jit.load(name)
    said = str(refused.value)
    assert f"{name} is not compiled for this release in {jit.PREBUILT_DIR}, {tmp_path / 'cache'}" in said
    assert "no nvcc on PATH or under CUDA_HOME" in said and "hopper-moe kernels build --into DIR" in said
    assert "set HOPPER_MOE_CACHE_DIR to a copy of DIR" in said
    assert not (tmp_path / "cache").exists(), "nothing is written where nothing can be compiled"
    assert CliRunner().invoke(hopper_moe, ["kernels", "list"]).exit_code == 0, "what is there can be listed"


@pytest.mark.parametrize("where", ["prebuilt", "cache"])
def test_a_library_compiled_elsewhere_loads_without_a_compiler(where, prebuilt, no_nvcc, tmp_path, monkeypatch, caplog):
    """H17: from the wheel's own folder, or from a read-only cache; nothing is compiled or written."""
    if where == "prebuilt":
        monkeypatch.setattr(jit, "PREBUILT_DIR", prebuilt)
    monkeypatch.setattr(jit.cache_dirs, "make", lambda folder: pytest.fail(f"{folder} would be written"))
    for name in jit.LIBRARIES:
        functions = jit.load(name, tmp_path / "empty" if where == "prebuilt" else prebuilt)
        assert len(functions["workspace_layout"](FLASH_RANK)) == len(workspace.WORKSPACE_FIELDS)
    assert not caplog.records


def test_a_damaged_library_is_one_sentence(tmp_path, no_nvcc):
    library = next(iter(jit.LIBRARIES.values()))
    damaged = jit.path_in(tmp_path, library)
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"not an ELF file")
    with pytest.raises(Refusal, match=f"{damaged} cannot be loaded here .*remove its folder"):
        jit.load(library.name, tmp_path)


def test_a_cache_on_a_noexec_mount_is_named(tmp_path, no_nvcc, monkeypatch):
    library = next(iter(jit.LIBRARIES.values()))
    there = jit.path_in(tmp_path, library)
    there.parent.mkdir(parents=True)
    there.write_bytes(b"not an ELF file")
    found = list(os.statvfs(tmp_path))
    found[8] |= os.ST_NOEXEC
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(found))
    with pytest.raises(Refusal, match=f"{there} cannot be loaded: its file system is mounted noexec"):
        jit.load(library.name, tmp_path)


def test_flashinfers_library_without_a_compiler_is_one_sentence(no_nvcc, tmp_path, monkeypatch):
    monkeypatch.setattr(w4a16, "library_path", lambda: tmp_path / "fused_moe_90.so")
    with pytest.raises(Refusal, match="w4a16 needs FlashInfer's library .*no nvcc .*flashinfer-jit-cache"):
        w4a16.build()


def test_build_says_in_one_line_that_a_source_does_not_compile(sources):
    (sources / "bindings.cu").write_text("int broken() { return no_such_name; }\n")
    done = CliRunner().invoke(hopper_moe, ["kernels", "build", next(iter(jit.LIBRARIES))])
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
    fields = list(map(int, jit.load(PackedExperts.library)["workspace_layout"](FLASH_RANK)))
    assert len(fields) == len(workspace.WORKSPACE_FIELDS)
    at = dict(zip(workspace.WORKSPACE_FIELDS, fields, strict=True))
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
    without_options = jit.load(PackedExperts.library)["workspace_layout"]([*FLASH_RANK[:-2], 0, 0])
    plain = dict(zip(workspace.WORKSPACE_FIELDS, without_options, strict=True))
    assert plain["x_scale"] - plain["x"] == capacity * hidden
    assert plain["pool_x"] - plain["combine"] == 2 * capacity * top_k * hidden


def test_buffer_of_eight_ranks_stays_under_a_gibibyte():
    """Flash, 8192 tokens a rank: the issue's bound; the pools do not grow with the ranks."""
    shard = ExpertShard.of(SHAPES["flash"], 8192)
    of_ranks = {n: replace(shard, num_local_experts=256 // n) for n in (2, 4, 8)}
    sizes = {n: workspace.workspace_bytes(of_rank, "mxfp4_mega", num_ranks=n) for n, of_rank in of_ranks.items()}
    print({n: f"{size / 2**30:.2f} GiB" for n, size in sizes.items()})
    assert sizes[8] < 2**30
    fp8 = workspace.workspace_bytes(replace(of_ranks[8], fp8_combine=True), "mxfp4_mega", num_ranks=8)
    assert 0.15 * 2**30 < sizes[8] - fp8 < 0.2 * 2**30, "half the combine slots, less their scales"


def test_the_start_up_block_tells_the_exchange_buffer():
    """What is logged is what `MegaMoE` will take: with a group the buffer of its ranks, with the options that are on."""
    alone = ExpertShard.of(SHAPES["flash"], 8192, rank=1, num_ranks=8, fp8_combine=True)
    shard = replace(alone, group=object())
    for name in ("mxfp4_mega", "fp8_mega"):
        told = startup.workspace_bytes(REGISTRY[name], shard)
        assert told == workspace.workspace_bytes(alone, name, num_ranks=8)
        assert told != startup.workspace_bytes(REGISTRY[name], alone)
    assert startup.workspace_bytes(REGISTRY["w4a16"], shard) == 0
