"""Loads a DeepSeek-V4 checkpoint (original naming, FP4 experts) for the CPU host."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from hopper_moe.launch.cpu_host import attention
from hopper_moe.launch.cpu_host.experts import attach_packed_experts, use_kernel
from hopper_moe.launch.cpu_host.kernels import CPU_KERNELS, TRANSFORMERS
from hopper_moe.quantization.checkpoint import Checkpoint
from hopper_moe.quantization.checkpoint_check import read_checkpoint, validate_checkpoint
from hopper_moe.quantization.errors import Refusal

MAX_PARAMETERS = 2_000_000_000  # dequantised to FP32 on load: 8 GB


def load(folder: str | Path, kernel: str):
    """(model in FP32, tokenizer), experts running through `kernel` (one of `CPU_KERNELS`).

    Raises `Refusal` before any weight is read when the checkpoint or the kernel cannot be served here.
    """
    if kernel not in CPU_KERNELS:
        raise Refusal(f"kernel {kernel} does not run on a CPU: choose one of {', '.join(CPU_KERNELS)}.")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise Refusal(f"{folder} is no folder: the CPU host serves local checkpoints only, so download it first.")
    facts, _ = read_checkpoint(folder)
    if facts.expert_dtype != "fp4":
        raise Refusal(f"{folder}: experts are {facts.expert_dtype}, and the CPU host serves FP4 experts only.")
    size = 3 * facts.hidden_size * facts.intermediate_size * facts.num_experts * facts.num_moe_layers
    if size > MAX_PARAMETERS:
        raise Refusal(
            f"{folder}: {size / 1e9:.1f} billion expert parameters, and the CPU host takes at most {MAX_PARAMETERS / 1e9:.0f}: "
            "serve it on a Hopper machine."
        )
    validate_checkpoint(folder, for_cuda_kernel=kernel != TRANSFORMERS)
    _check_expert_bytes(folder)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "deepseek_v4":
        raise Refusal(f"{folder}: model_type {config.model_type}, and the CPU host knows deepseek_v4 only.")
    config.expert_dtype = facts.expert_dtype  # if absent, SGLang reads the weights' type (FP4) and transformers assumes FP8
    tokenizer = _tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    # transformers keeps norms in FP32 but dequantises to BF16 for every dtype; mixed types fail in the first matmul.
    model = model.float().eval()
    model.set_attn_implementation(attention.NAME)
    attention.leave_out_empty_heads(model)
    if kernel == TRANSFORMERS:
        model.set_experts_implementation("grouped_mm")
    else:
        attach_packed_experts(model, folder)
        use_kernel(model, kernel)
    return model, tokenizer


def _tokenizer(folder: Path):
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise their own kinds for missing and damaged files
        reason = " ".join(str(error).split())[:200].rstrip(".:")
        raise Refusal(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {reason}): fetch tokenizer.json and "
            "tokenizer_config.json."
        ) from None


def _check_expert_bytes(folder: Path) -> None:
    """transformers reads FP4 experts as I8 bytes only: U8 it loads with a wrong shape, F4 it cannot load."""
    for name, info in Checkpoint.open(folder).tensors.items():
        if info.name.removeprefix("model.") != name:
            raise Refusal(
                f"{folder}: {info.name} is named in the Hugging Face way, and transformers reads the original names only "
                f"({name}): rename the tensors or serve it on a Hopper machine."
            )
        if ".ffn.experts." in name and name.endswith(".weight") and info.dtype != "I8":
            raise Refusal(
                f"{folder}: {name} is stored as {info.dtype}, and transformers reads FP4 experts as I8 only: rewrite it as I8."
            )
