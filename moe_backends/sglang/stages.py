"""Which layers a pipeline stage holds, as SGLang divides them (`get_pp_indices`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise

PARTITION = "SGLANG_PP_LAYER_PARTITION"


def stage_layers(num_layers: int, num_stages: int, environ: Mapping[str, str]) -> list[range]:
    """The layers of every stage, for a division that `stage_refusals` has nothing against: SGLANG_PP_LAYER_PARTITION, or equal
    shares of which the last ones get a layer more."""
    base, more = divmod(num_layers, num_stages)
    counts = [base + (stage >= num_stages - more) for stage in range(num_stages)]
    if num_stages > 1 and PARTITION in environ:
        counts = [int(count) for count in environ[PARTITION].split(",")]
    return [range(*edges) for edges in pairwise(accumulate(counts, initial=0))]


def stage_refusals(num_layers: int, num_stages: int, environ: Mapping[str, str]) -> Iterator[str]:
    """Why the layers cannot be divided so; SGLang would say it with a traceback in every worker."""
    if num_stages > num_layers:
        yield f"--pp-size {num_stages} is above the {num_layers} layers of the model: use {num_layers} or less."
    if num_stages < 2 or PARTITION not in environ:
        return
    given = environ[PARTITION].split(",")
    counts = [int(count) for count in given if count.strip().isdecimal()]
    if len(counts) != len(given) or len(counts) != num_stages or sum(counts) != num_layers or 0 in counts:
        yield (
            f"{PARTITION}={environ[PARTITION]} does not give each of {num_stages} stages a number of layers, {num_layers} in "
            "all: mend or unset it."
        )
