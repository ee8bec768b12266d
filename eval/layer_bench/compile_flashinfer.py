"""Compiles the part of FlashInfer's `fused_moe_90` that MXFP4 experts need, for benchmarks of `flashinfer_mxfp4`.

`python -m hopper_moe.eval.layer_bench.compile_flashinfer --jobs 16`. All of `fused_moe_90` has several times as many kernels, of
other weight types, and compiles at the first call. Here: BF16 and FP8 activations on MXFP4 weights, BF16 results, each tile with
the one schedule that FlashInfer's tuner tries for it. No GPU is needed. About 100 minutes of one core, 8 GiB a job.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click

from hopper_moe.kernels.benchmarks.options import RefusingCommand
from hopper_moe.quantization.errors import Refusal

NAME = "fused_moe_90"
KERNELS_PER_FILE = 8
_HEADERS = ("cublas*", "curand*", "cusparse*", "cusolver*", "nvrtc*", "cufft*")  # what FlashInfer includes of CUDA's libraries
_KEPT = (
    "moe_gemm_tma_warp_specialized_input", "moe_gemm_kernels_bf16_fp4", "moe_gemm_kernels_fp8_fp4", "moe_gemm_mixed_utils",
    "flashinfer_cutlass_fused_moe_binding", "deepgemm_jit_setup", "cutlass_fused_moe_instantiation", "envUtils", "logger",
    "stringUtils", "tllmException", "memoryUtils", "preQuantScaleKernel", "cutlass_heuristic", "lora",
)  # fmt: skip
_LEFT_OUT = ("tensorrt_llm", "fp8_blockscale", "cutlass_kernels", "deep_gemm")  # in names of functions whose sources may be


def is_cooperative(tile: tuple[int, int, int]) -> bool:
    """Whether the tuner tries the cooperative schedule for a tile (M, N, K), else ping-pong; `cutlass_heuristic.cpp`, 0.7."""
    m, n, k = tile
    if m == 128:
        return n in (16, 32, 64) or (n in (128, 256) and k in (128, 256))
    return m == 256 and ((n == 128 and k in (128, 256)) or (n == 256 and k == 128))


def operations() -> list[Any]:
    """FlashInfer's own list of kernels, without those that no MXFP4 layer with BF16 results calls; alike ones side by side."""
    from flashinfer.jit.gemm.cutlass import generate_kernels as generator

    def is_tried(op: Any) -> bool:
        cooperative = generator.KernelScheduleType.TmaWarpSpecializedCooperative
        usual = op.sm90_mixed_input_kernel_type == "warp_specialized"
        return not usual or (op.mainloop_schedule == cooperative) == is_cooperative(op.cta_shape)

    found = [
        op
        for op in generator.generate_sm90_mixed_type_grouped_gemm_operations(True)
        if op.weight_type == generator.e2m1 and op.output_type == generator.DataType.bf16 and is_tried(op)
    ]
    return sorted(found, key=lambda op: (str(op.act_type), op.sm90_mixed_input_kernel_type, op.cta_shape[2], op.cta_shape))


def write_sources(folder: Path, _architectures: str = "") -> None:
    """Takes the place of FlashInfer's `generate_gemm_operations`."""
    from flashinfer.jit.gemm.cutlass import generate_kernels as generator

    launcher = "tensorrt_llm/kernels/cutlass_kernels/moe_gemm/launchers/moe_gemm_tma_ws_mixed_input_launcher.inl"
    every = operations()
    for number, first in enumerate(range(0, len(every), KERNELS_PER_FILE)):
        group = every[first : first + KERNELS_PER_FILE]
        generator.write_file([launcher], group, str(folder / f"mxfp4_{number:02d}.generated.cu"))


@contextmanager
def reduced() -> Iterator[None]:
    """FlashInfer's generator of `fused_moe_90` with our sources and, of its own, what they need."""
    from flashinfer.jit import fused_moe

    whole = fused_moe.gen_jit_spec

    def spec(name: str, sources: list[Path], **how: Any) -> Any:
        kept = [path for path in sources if path.name.startswith("mxfp4_") or path.stem.endswith(_KEPT)]
        return whole(name, kept, **how)

    with (
        mock.patch.object(fused_moe, "generate_gemm_operations", write_sources),
        mock.patch.object(fused_moe, "gen_jit_spec", spec),
    ):
        yield


def missing_headers(toolkit: Path, folder: Path) -> None:
    """Links in `folder` to headers of CUDA's libraries that come as Python packages and not with the toolkit."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    for pattern in _HEADERS:
        for header in packages.glob(f"*/include/{pattern}"):
            if not (toolkit / "include" / header.name).exists() and not (folder / header.name).exists():
                (folder / header.name).symlink_to(header)


def traps(names: list[str]) -> str:
    """Assembly of functions that end the process: weak, in the place of kernels that were left out and are never called."""
    functions = "".join(f".weak {name}\n.type {name},@function\n{name}:\n ud2\n" for name in names)
    return f'.text\n{functions}.section .note.GNU-stack,"",@progbits\n'


def undefined(library: Path) -> list[str]:
    """FlashInfer's functions that `library` calls and does not have."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    return sorted({line.split()[-1] for line in listed.splitlines() if any(part in line for part in _LEFT_OUT)})


def link(objects: list[str], libraries: list[str], out: Path) -> None:
    """A shared library of `objects`; calls to what is not among them end the process."""
    with tempfile.TemporaryDirectory() as scratch:
        first, source = Path(scratch) / "first.so", Path(scratch) / "traps.s"
        subprocess.run(["g++", "-shared", *objects, *libraries, "-o", str(first)], check=True)
        source.write_text(traps(undefined(first)))
        subprocess.run(["g++", "-shared", *objects, str(source), *libraries, "-o", str(out)], check=True)


@click.command(cls=RefusingCommand)
@click.option("--jobs", default=os.cpu_count() or 1, show_default="cores", type=click.IntRange(1))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The library.  [default: where FlashInfer looks]")
def main(jobs: int, out: Path | None) -> None:
    """Compile and link; FlashInfer then loads the library instead of compiling its own."""
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    from flashinfer.jit import cpp_ext, env, fused_moe

    toolkit = Path(cpp_ext.get_cuda_path())
    if shutil.which("ninja") is None or not (toolkit / "bin" / "nvcc").exists():
        raise Refusal(f"compiling needs ninja and nvcc, and {toolkit} holds no bin/nvcc or ninja is not installed: install both.")
    out = out or Path(env.get_aot_path(NAME))
    with tempfile.TemporaryDirectory() as headers, reduced():
        missing_headers(toolkit, Path(headers))
        for variable in ("FLASHINFER_EXTRA_CUDAFLAGS", "FLASHINFER_EXTRA_CFLAGS"):
            os.environ[variable] = f"-I{headers} -I{toolkit}/include {os.environ.get(variable, '')}"
        spec = fused_moe.gen_cutlass_fused_moe_sm90_module()
        spec.write_ninja()
        objects = re.findall(r"^build (\S+\.o):", spec.ninja_path.read_text(), re.MULTILINE)
        subprocess.run(["ninja", "-C", str(spec.ninja_path.parent), f"-j{jobs}", *objects], check=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    stubs = [f"-L{toolkit}/lib64", f"-L{toolkit}/lib64/stubs", "-lcudart", "-lcuda", "-lnvrtc"]
    link(objects, stubs, out)
    click.echo(f"{len(objects)} objects in {out}")


if __name__ == "__main__":
    main()
