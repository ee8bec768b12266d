"""Compile the CUDA sources and load the libraries (apache-tvm-ffi). Libraries that were compiled elsewhere need no compiler.

A compiled library is `<folder>/<name>-<key>/<name>.so`. The key is a hash of what decides whether the library fits this package:
sources, flags, constants of the layout, the ABI of tvm-ffi and the CPU architecture. It does not depend on the compiler, which
may be absent. The folder inside a wheel with compiled libraries is searched first, then the cache folder.

A build runs in a temporary folder next to its target and is renamed into place. Concurrent processes end with the same folder,
and none loads a partly written file.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from hopper_moe.kernels import cache_dir as cache_dirs
from hopper_moe.quantization import layout
from hopper_moe.quantization.errors import Refusal

logger = logging.getLogger("hopper_moe")

SOURCE_DIR = Path(__file__).parent / "csrc"
PREBUILT_DIR = Path(__file__).parent / "prebuilt"
"""Libraries that came with the wheel (`make wheel-cubins`)."""
ARCHITECTURE = ("-gencode=arch=compute_90a,code=sm_90a",)
FLAGS = ("-O3", "-std=c++17", *ARCHITECTURE)
BUILD_ELSEWHERE = (
    "run `hopper-moe kernels build --into DIR` with this release where a toolkit is, and set "
    f"{cache_dirs.VARIABLE} to a copy of DIR here."
)
MIN_TVM_FFI = "0.1.11"  # as in pyproject.toml: a library built with it crashes the process in 0.1.5
SAID_AT_MOST = 1000  # characters of a failed compiler's output in a refusal, from its end, as one line


@dataclass(frozen=True)
class Library:
    """One shared library: its name, the translation unit (in csrc/) that includes all the others, and its own `-D` constants."""

    name: str
    source: str
    defines: tuple[str, ...] = ()


LIBRARIES = {
    library.name: library
    for library in (
        Library("mxfp4_mega", "bindings.cu", ("-DHM_WEIGHT_BITS=4", "-DHM_WIDE_SCALES=0")),
        Library("mxfp4_wide", "bindings.cu", ("-DHM_WEIGHT_BITS=4", "-DHM_WIDE_SCALES=1")),
        Library("fp8_mega", "bindings.cu", ("-DHM_WEIGHT_BITS=8", "-DHM_WIDE_SCALES=0")),
    )
}


def nvcc_if_any() -> Path | None:
    """The CUDA compiler: on PATH, or under CUDA_HOME. None: there is none."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    return None if found is None else Path(found)


def find_nvcc() -> Path:
    """`nvcc_if_any`. Raises Refusal when there is none."""
    found = nvcc_if_any()
    if found is None:
        raise Refusal("no nvcc on PATH or under CUDA_HOME: install the CUDA 13 toolkit, or " + BUILD_ELSEWHERE)
    return found


def constants() -> list[str]:
    """`-D` constants of the layout, which every translation unit needs."""
    return [f"-DHM_{name}={value}" for name, value in sorted(layout.as_defines().items())]


def include_flags(csrc: Path | None = None) -> list[str]:
    """Include paths and `constants`; `csrc`: headers that are not ours."""
    from tvm_ffi import libinfo

    paths = [str(csrc or SOURCE_DIR), libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
    return [f"-I{path}" for path in paths] + constants()


@functools.cache
def toolkit(nvcc: Path) -> str:
    """What `nvcc --version` prints. Raises Refusal if it fails."""
    return _run([str(nvcc), "--version"], f"`{nvcc} --version` failed").stdout


def _run(command: list[str], failed: str, **how) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, **how)
    except OSError as error:
        raise Refusal(f"{failed} ({error.strerror}): install the CUDA 13 toolkit again.") from None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split()) or "no output"
        raise Refusal(
            f"{failed} (exit code {done.returncode}), mend that or install the CUDA 13 toolkit again: {said[-SAID_AT_MOST:]}"
        )
    return done


def tvm_ffi_abi() -> str:
    """Libraries built with one tvm-ffi load with others of the same major and minor version, from MIN_TVM_FFI on. Raises Refusal
    without tvm-ffi, and for an older one."""
    try:
        version = importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        raise Refusal(
            "the compiled kernels need apache-tvm-ffi, which is not installed: pip install 'sglang-hopper-moe[sglang]'."
        ) from None
    if Version(version) < Version(MIN_TVM_FFI):
        raise Refusal(f"apache-tvm-ffi {version} is older than {MIN_TVM_FFI}: pip install 'apache-tvm-ffi>={MIN_TVM_FFI},<0.2'.")
    return ".".join(version.split(".")[:2])


def cache_key(library: Library) -> str:
    """Hex digest of everything that decides whether a compiled library fits this package and machine. Needs no compiler."""
    digest = hashlib.sha256()
    for text in (library.source, *library.defines, *FLAGS, *constants(), tvm_ffi_abi(), platform.machine()):
        digest.update(text.encode() + b"\0")
    for path in sorted(SOURCE_DIR.rglob("*.cu*")):
        digest.update(str(path.relative_to(SOURCE_DIR)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def path_in(folder: Path, library: Library) -> Path:
    """Path of the compiled library in a folder, whether or not it exists."""
    return folder / f"{library.name}-{cache_key(library)}" / f"{library.name}.so"


def places(cache_dir: Path | None = None) -> list[Path]:
    """Folders that are searched, in order; `cache_dir`: default HOPPER_MOE_CACHE_DIR. Builds are written to the last one."""
    cache = cache_dirs.cache_dir() if cache_dir is None else cache_dir
    read_only = [cache_dirs.user_dir()] if cache == cache_dirs.fallback_dir() else []
    return [PREBUILT_DIR, *filter(None, read_only), cache]


def find(library: Library, cache_dir: Path | None = None) -> Path | None:
    """The compiled library; None: it has to be built."""
    paths = [path_in(folder, library) for folder in places(cache_dir) if cache_dirs.is_trusted(folder)]
    return next((path for path in paths if os.path.exists(path)), None)


def library_path(library: Library, cache_dir: Path | None = None) -> Path:
    """Path of the compiled library, or of its future build."""
    return find(library, cache_dir) or path_in(places(cache_dir)[-1], library)


def compile_source(source: Path, output: Path, *options: str, csrc: Path | None = None) -> str:
    """Compile one translation unit, with our headers or those of `csrc`; returns the compiler's output. Raises Refusal with the
    end of that output if it fails."""
    command = [str(find_nvcc()), *FLAGS, *include_flags(csrc), *options, "-o", str(output), str(source)]
    environ = {**os.environ, "TMPDIR": str(output.parent)}  # other folders may not be writable
    return _run(command, f"{command[0]} could not compile {source.name}", env=environ).stderr


def _nvcc(library: Library, output: Path, *options: str) -> str:
    """`compile_source` of a library."""
    return compile_source(SOURCE_DIR / library.source, output, *library.defines, *options)


def build(name: str, cache_dir: Path | None = None) -> Path:
    """Compile one library into the cache folder unless it exists there or in the wheel; returns its path. Logs that it compiles
    and how long it took. Raises Refusal without a compiler, for a folder that is not writable, and with the end of the compiler's
    output if it fails."""
    library = LIBRARIES[name]
    if (found := find(library, cache_dir)) is not None:
        return found
    *others, folder = places(cache_dir)
    if nvcc_if_any() is None:
        looked_at = ", ".join(str(place) for place in (*others, folder))
        raise Refusal(
            f"{name} is not compiled for this release in {looked_at}, and there is no nvcc on PATH or under CUDA_HOME to compile "
            f"it: {BUILD_ELSEWHERE}"
        )
    return build_into(library, folder)


def build_into(library: Library, folder: Path) -> Path:
    """Compile one library into a folder unless it exists there; see `build`."""
    target, started = path_in(folder, library), time.monotonic()
    if os.path.exists(target):
        return target
    nvcc = find_nvcc()
    from tvm_ffi import libinfo

    cache_dirs.make(folder)
    logger.warning("compiling %s with %s into %s: about a minute, once", library.name, nvcc, folder)
    with tempfile.TemporaryDirectory(prefix=f".{library.name}-", dir=folder) as scratch:
        built = Path(scratch) / "out"
        built.mkdir()
        tvm_ffi_dir = Path(libinfo.find_libtvm_ffi()).parent
        _nvcc(library, built / target.name, "-shared", "-Xcompiler", "-fPIC", f"-L{tvm_ffi_dir}", "-ltvm_ffi")
        try:
            os.rename(built, target.parent)
        except OSError:
            if not target.exists():  # otherwise another process was first, with the same library
                raise
    logger.warning("compiled %s in %.0f s", library.name, time.monotonic() - started)
    return target


def load(name: str, cache_dir: Path | None = None):
    """The library's functions, compiled on first use (about a minute) unless they were before. Raises Refusal like `build`, and
    for a library that this machine cannot load."""
    return _load(build(name, cache_dir))


@functools.cache
def _load(path: Path):
    import tvm_ffi

    try:
        return tvm_ffi.load_module(str(path))
    except (OSError, RuntimeError) as error:  # another C library, a damaged file
        if os.statvfs(path).f_flag & os.ST_NOEXEC:
            raise Refusal(
                f"{path} cannot be loaded: its file system is mounted noexec, so set HOPPER_MOE_CACHE_DIR to a folder elsewhere."
            ) from None
        raise Refusal(
            f"{path} cannot be loaded here ({' '.join(str(error).split())[-SAID_AT_MOST:]}): remove its folder, then run "
            "`hopper-moe kernels build` on this machine or one like it."
        ) from None


def compile_report(name: str) -> str:
    """Output of ptxas for every kernel (registers, spills, serialised WGMMAs). Needs nvcc, no GPU."""
    with tempfile.TemporaryDirectory() as scratch:
        return _nvcc(LIBRARIES[name], Path(scratch) / "k.cubin", "-cubin", "-Xptxas", "-v")
