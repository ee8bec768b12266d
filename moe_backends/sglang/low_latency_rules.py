"""DeepEP's low-latency mode: what a rank may send in one call, and refusals of launches that come to send more.

Neither SGLang nor DeepEP checks this before a request does: DeepEP then ends the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from hopper_moe.moe_backends.sglang.launch_view import LaunchView

BUDGET = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
DEFAULT_BUDGET = 128
MAX_BUDGET = 1024
"""SGLang's dispatcher asserts it; the next number is a tag in DeepEP's messages."""
HIDDEN_SIZES = (2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
"""Those that the package deep_ep was compiled for."""


def block_tokens(environ: Mapping[str, str]) -> int | None:
    """Tokens that a rank may send in one call; None: the variable holds no number that DeepEP takes."""
    text = environ.get(BUDGET, str(DEFAULT_BUDGET))
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    return number if 1 <= number <= MAX_BUDGET else None


def low_latency_refusals(view: LaunchView, hidden_size: int, environ: Mapping[str, str]) -> Iterator[str]:
    """Of a launch whose decoding, at least, runs in this mode."""
    mode = f"--deepep-mode {view.deepep_mode}"
    if hidden_size not in HIDDEN_SIZES:
        yield (
            f"{mode} cannot send rows of hidden_size {hidden_size}, DeepEP's low-latency mode has "
            f"{', '.join(map(str, HIDDEN_SIZES))}: use --deepep-mode normal."
        )
    budget = block_tokens(environ)
    if budget is None:
        yield (
            f"{BUDGET}={environ[BUDGET]} is outside 1..{MAX_BUDGET}, the tokens that a rank may send in DeepEP's low-latency "
            f"mode: set it inside, or unset it for {DEFAULT_BUDGET}."
        )
        return
    if view.args.disaggregation_mode != "prefill":
        yield from _decoding(view, mode, budget)
    if view.deepep_mode == "low_latency" and view.args.disaggregation_mode != "decode":
        yield from _prefill(view, mode, budget)


def _decoding(view: LaunchView, mode: str, budget: int) -> Iterator[str]:
    """Buckets of CUDA graphs need no look: SGLang captures none above the requests that may run."""
    requests, per_request = view.args.max_running_requests, view.tokens_per_request
    most = max(budget * view.attn_tp_size // per_request, 1) * view.attn_dp_size
    if not requests:
        if view.is_resolved:
            yield (
                f"{mode} sends at most {budget} tokens per rank in decoding ({BUDGET}), but nothing bounds the requests that "
                f"run: give --max-running-requests, {most} or less."
            )
        return
    needed = _of_one_rank(view, max(requests // view.attn_dp_size, 1) * per_request)
    if needed > budget:
        drafts = f" of {per_request} draft tokens" if per_request > 1 else ""
        yield (
            f"{mode} sends at most {budget} tokens per rank in decoding ({BUDGET}), but {requests} running requests{drafts} "
            f"bring {needed}: {_choices(needed, f'lower --max-running-requests to {most}')}."
        )


def _prefill(view: LaunchView, mode: str, budget: int) -> Iterator[str]:
    chunk = view.chunked_prefill_size
    if chunk is None and not view.is_resolved:
        return
    if not chunk or chunk < 0:
        yield (
            f"{mode} sends at most {budget} tokens per rank ({BUDGET}), also in prefill: give a positive --chunked-prefill-size."
        )
        return
    needed = _of_one_rank(view, view.largest_chunk)
    if needed > budget:
        yield (
            f"{mode} sends at most {budget} tokens per rank ({BUDGET}), also in prefill, but chunks bring {needed}: "
            f"{_choices(needed, 'lower --chunked-prefill-size', 'use --deepep-mode auto')}."
        )


def _of_one_rank(view: LaunchView, tokens: int) -> int:
    """Ranks of attention tensor parallelism divide the tokens before they send them."""
    return -(-tokens // view.attn_tp_size)


def _choices(needed: int, *others: str) -> str:
    """What to do about a budget below `needed`."""
    found = [f"set {BUDGET}={needed}", *others] if needed <= MAX_BUDGET else [*others]
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))
