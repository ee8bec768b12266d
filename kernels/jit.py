"""Compiles the CUDA sources once per machine and loads them (apache-tvm-ffi).

A compiled library lives in `<cache dir>/<name>-<key>/`, where the key hashes every source, the flags, the constants of the
layout, the compiler and the tvm-ffi version. A build happens in a temporary folder beside it that is renamed into place, so any
number of processes may race: all of them end with the same folder and nobody loads a half-written file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization import layout

SOURCE_DIR = Path(__file__).parent / "csrc"
ARCHITECTURE = ("-gencode=arch=compute_90a,code=sm_90a",)
FLAGS = ("-O3", "-std=c++17", *ARCHITECTURE)
SAID_AT_MOST = 1000  # characters of a failed compiler's output in a refusal: its last errors, and still one line


@dataclass(frozen=True)
class Library:
    """One shared library: its name, the translation unit (in csrc/) that includes all the others, and its own `-D` constants."""

    name: str
    source: str
    defines: tuple[str, ...] = ()


LIBRARIES = {
    library.name: library
    for library in (
        Library("mega_moe", "bindings.cu", ("-DHM_WEIGHT_BITS=4",)),
        Library("fp8_mega", "bindings.cu", ("-DHM_WEIGHT_BITS=8",)),
    )
}


def find_nvcc() -> Path:
    """The CUDA compiler: on PATH, or under CUDA_HOME. Raises Refusal when there is none."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    if found is None:
        raise Refusal(
            "no nvcc on PATH or under CUDA_HOME: install the CUDA 13 toolkit, or run `hopper-moe kernels build` where one is."
        )
    return Path(found)


def include_flags(csrc: Path | None = None) -> list[str]:
    """Include paths and `-D` constants that every translation unit needs; `csrc`: headers that are not ours."""
    from tvm_ffi import libinfo

    paths = [str(csrc or SOURCE_DIR), libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
    return [f"-I{path}" for path in paths] + [f"-DHM_{name}={value}" for name, value in sorted(layout.as_defines().items())]


@functools.cache
def toolkit(nvcc: Path) -> str:
    """What `nvcc --version` prints. Raises Refusal if it fails."""
    return _run([str(nvcc), "--version"], f"`{nvcc} --version` failed").stdout


def _run(command: list[str], failed: str) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Refusal(f"{failed} ({error.strerror}): install the CUDA 13 toolkit again.") from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split()) or "no output"
        raise Refusal(
            f"{failed} (exit code {done.returncode}), mend that or install the CUDA 13 toolkit again: {said[-SAID_AT_MOST:]}"
        )
    return done


def cache_key(library: Library) -> str:
    """Hex digest of everything that decides the compiled bytes."""
    digest = hashlib.sha256()
    defines = [flag for flag in include_flags() if flag.startswith("-D")]
    tools = (toolkit(find_nvcc()), importlib.metadata.version("apache-tvm-ffi"))
    for text in (library.source, *library.defines, *FLAGS, *defines, *tools):
        digest.update(text.encode() + b"\0")
    for path in sorted(SOURCE_DIR.rglob("*.cu*")):
        digest.update(str(path.relative_to(SOURCE_DIR)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def library_path(library: Library) -> Path:
    """Where the compiled library is, or will be."""
    return settings().cache_dir / f"{library.name}-{cache_key(library)}" / f"{library.name}.so"


def compile_source(source: Path, output: Path, *options: str, csrc: Path | None = None) -> str:
    """Compiles one translation unit, with our headers or those of `csrc`; what the compiler said. Raises Refusal with the end of
    its words if it fails."""
    command = [str(find_nvcc()), *FLAGS, *include_flags(csrc), *options, "-o", str(output), str(source)]
    return _run(command, f"{command[0]} could not compile {source.name}").stderr


def _nvcc(library: Library, output: Path, *options: str) -> str:
    """`compile_source` of a library."""
    return compile_source(SOURCE_DIR / library.source, output, *library.defines, *options)


def build(name: str) -> Path:
    """Compiles one library unless the cache has it; returns its path. Raises Refusal with the end of the compiler's words if
    it fails."""
    library = LIBRARIES[name]
    target = library_path(library)
    if target.exists():
        return target
    from tvm_ffi import libinfo

    target.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{library.name}-", dir=target.parent.parent) as scratch:
        built = Path(scratch) / "out"
        built.mkdir()
        tvm_ffi_dir = Path(libinfo.find_libtvm_ffi()).parent
        _nvcc(library, built / target.name, "-shared", "-Xcompiler", "-fPIC", f"-L{tvm_ffi_dir}", "-ltvm_ffi")
        try:
            os.rename(built, target.parent)
        except OSError:
            if not target.exists():  # otherwise another process was first, with the same bytes
                raise
    return target


@functools.cache
def load(name: str):
    """The library's functions, compiled on first use (about a minute) and then from the cache."""
    import tvm_ffi

    return tvm_ffi.load_module(str(build(name)))


def compile_report(name: str) -> str:
    """ptxas' words about every kernel (registers, spills, serialised WGMMAs). Needs nvcc, no GPU."""
    with tempfile.TemporaryDirectory() as scratch:
        return _nvcc(LIBRARIES[name], Path(scratch) / "k.cubin", "-cubin", "-Xptxas", "-v")
