"""eval/layer_bench/compile_flashinfer as far as it takes seconds: which kernels, and that missing ones are traps."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from hopper_moe.eval.layer_bench import compile_flashinfer as subject

flashinfer = pytest.importorskip("flashinfer")


def test_every_tile_has_one_schedule_in_both_precisions():
    found = subject.operations()
    usual = [op for op in found if op.sm90_mixed_input_kernel_type == "warp_specialized"]
    kinds = {(str(op.act_type), op.cta_shape, op.cga_shape) for op in usual}
    assert len(kinds) == len(usual) == 2 * 29 * 4 and len(found) == len(usual) + 10
    of = {activation: {op[1:] for op in kinds if op[0] == activation} for activation in {op[0] for op in kinds}}
    assert len(of) == 2 and len(set(map(frozenset, of.values()))) == 1


def test_sources_hold_every_kernel_once(tmp_path):
    subject.write_sources(tmp_path)
    text = "".join(path.read_text() for path in tmp_path.glob("mxfp4_*.generated.cu"))
    assert text.count("template void") == len(subject.operations()) and len(list(tmp_path.iterdir())) == 31


def test_the_module_keeps_what_mxfp4_needs(tmp_path, monkeypatch):
    from flashinfer.jit import env, fused_moe

    monkeypatch.setattr(env, "FLASHINFER_GEN_SRC_DIR", tmp_path)
    kept: list[str] = []
    monkeypatch.setattr(fused_moe, "gen_jit_spec", lambda _name, sources, **_how: kept.extend(path.stem for path in sources))
    with subject.reduced():
        fused_moe.gen_cutlass_fused_moe_module([], "90")
    assert sum(stem.startswith("mxfp4_") for stem in kept) == 31
    for part in subject._KEPT:
        assert [stem for stem in kept if stem.endswith(part)], part
    assert len(kept) == 31 + len(subject._KEPT)


def test_a_call_of_what_was_left_out_ends_the_process(tmp_path):
    """`known` works; `tensorrt_llm_gone` has no source, and the library loads all the same."""
    source, built, out = tmp_path / "a.c", tmp_path / "a.o", tmp_path / "a.so"
    source.write_text("void tensorrt_llm_gone(void); int known(void) { return 7; } void call(void) { tensorrt_llm_gone(); }")
    subprocess.run(["gcc", "-fPIC", "-c", str(source), "-o", str(built)], check=True)
    subject.link([str(built)], [], out)
    assert subject.undefined(out) == [] and ctypes.CDLL(str(out)).known() == 7
    died = subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(out)!r}).call()"], check=False)
    assert died.returncode < 0


def test_headers_of_the_toolkit_come_first(tmp_path, monkeypatch):
    toolkit, packages, links = tmp_path / "cuda", tmp_path / "site", tmp_path / "links"
    for header in (
        toolkit / "include" / "cublas.h",
        *((packages / "nvidia" / "cu13" / "include" / n) for n in ("cublas.h", "curand.h")),
    ):
        header.parent.mkdir(parents=True, exist_ok=True)
        header.touch()
    links.mkdir()
    monkeypatch.setattr(subject.sysconfig, "get_path", lambda _name: str(packages))
    subject.missing_headers(toolkit, links)
    assert [path.name for path in links.iterdir()] == ["curand.h"]
