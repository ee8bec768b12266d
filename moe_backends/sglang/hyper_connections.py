"""Hidden sizes that SGLang's fused hyper-connection step computes rightly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hopper_moe.moe_backends.env_table import is_off
from hopper_moe.quantization.model_facts import ModelFacts

FUSE = "SGLANG_OPT_FUSE_MHC_POST_PRE"

_MODEL_TYPE = "deepseek_v4"  # V4.1's hyper-connections take another path
_THREADS = 256  # of the kernel; each looks at one value of a part after the other, and only the row's end stops it


def fused_multiple(hidden_size: int) -> int:
    """What `hidden_size` must be a multiple of.

    `mhc_fused_post_pre` of SGLang 0.5.23 cuts rows of up to 32 tokens into 4 parts, into 8 below 8 tokens and up to 4096 values.
    A part that is no multiple of the threads runs on into the next one, whose values are then summed twice.
    """
    return _THREADS * (8 if hidden_size <= 4096 else 4)


def hyper_connection_refusals(model: ModelFacts, environ: Mapping[str, str]) -> Iterator[str]:
    """Why small decode batches of this model would be wrong."""
    multiple = fused_multiple(model.hidden_size)
    if model.model_type != _MODEL_TYPE or not model.hidden_size % multiple or is_off(environ.get(FUSE, "1")):
        return
    yield (
        f"hidden_size {model.hidden_size} is no multiple of {multiple}, so SGLang's fused hyper-connection step sums some values "
        f"twice in batches of up to 32 tokens: set {FUSE}=0."
    )
