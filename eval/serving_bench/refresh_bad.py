"""Updates that a server must refuse, each with a sentence, and the state that it documents for afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from hopper_moe.eval.serving_bench.trainer_calls import Answer, WeightCalls
from hopper_moe.eval.serving_bench.trainer_tensors import Named, Tensors, experts_of

UNCHANGED = "unchanged"
"""Nothing was written: the old weights go on."""
NOT_SERVED = "not served"
"""The layer is not served until one update brought all of its experts; a request to it ends the server."""

EXPERT = 5  # the one that is damaged


@dataclass(frozen=True)
class BadUpdate:
    name: str
    words: str  # regular expression that the answer's message holds
    state: str  # UNCHANGED or NOT_SERVED
    make: Callable[[WeightCalls, Tensors, int], Answer]  # calls, all tensors, number of the layer


def _parts(change: Callable[[dict[str, torch.Tensor], str], list[list[Named]]]) -> Callable[[WeightCalls, Tensors, int], Answer]:
    """A session with the calls that `change` makes of the expert's six tensors and their common name."""

    def make(calls: WeightCalls, tensors: Tensors, layer: int) -> Answer:
        own = experts_of(tensors, layer, EXPERT)
        return calls.session(change(own, f"layers.{layer}.ffn.experts.{EXPERT}"))

    return make


def _changed(tensor_name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[WeightCalls, Tensors, int], Answer]:
    """One tensor is another, the other five are as they should be."""

    def parts(own: dict[str, torch.Tensor], expert: str) -> list[list[Named]]:
        name = f"{expert}.{tensor_name}"
        return [list((own | {name: change(own[name])}).items())]

    return _parts(parts)


def with_nan(scale: torch.Tensor) -> torch.Tensor:
    """A copy whose byte in row 7, group 2 is NaN in UE8M0."""
    data = scale.view(torch.uint8).clone()
    data[7, 2] = 255
    return data.view(scale.dtype)


def _without_one_expert(calls: WeightCalls, tensors: Tensors, layer: int) -> Answer:
    missing = experts_of(tensors, layer, EXPERT)
    return calls.session([[pair for pair in experts_of(tensors, layer).items() if pair[0] not in missing]])


def _no_session(calls: WeightCalls, tensors: Tensors, layer: int) -> Answer:
    return calls.send(list(experts_of(tensors, layer, EXPERT).items()))


def _two_sessions(calls: WeightCalls, tensors: Tensors, layer: int) -> Answer:
    calls.begin()
    answer = calls.begin()
    calls.end()
    return answer


def _empty_folder(calls: WeightCalls, tensors: Tensors, layer: int) -> Answer:
    with TemporaryDirectory() as folder:
        return calls.from_disk(folder)


def _damaged_file(calls: WeightCalls, tensors: Tensors, layer: int) -> Answer:
    own = {name: tensor.cpu() for name, tensor in experts_of(tensors, layer, EXPERT).items()}
    name = f"layers.{layer}.ffn.experts.{EXPERT}.w1.scale"
    with TemporaryDirectory() as folder:
        save_file(own | {name: with_nan(own[name])}, Path(folder) / "model.safetensors")
        return calls.from_disk(folder)


BAD_UPDATES = (
    BadUpdate("a NaN scale", r"w1\.scale holds 255 \(NaN\) at row 7, group 2", NOT_SERVED, _changed("w1.scale", with_nan)),
    BadUpdate("another type", r"w2\.weight is torch\.float16", NOT_SERVED, _changed("w2.weight", torch.Tensor.half)),
    BadUpdate("another shape", r"w3\.weight has shape", NOT_SERVED, _changed("w3.weight", lambda t: t[:-1].contiguous())),
    BadUpdate(
        "another model",
        r"w1\.(weight|scale) has shape",  # whichever the bucket holds first
        NOT_SERVED,
        _parts(lambda own, _: [[(name, tensor[:, ::2].contiguous()) for name, tensor in own.items()]]),
    ),
    BadUpdate(
        "half a bucket", "did not come, [1-9] tensors of 1 experts", NOT_SERVED, _parts(lambda o, _: [list(o.items())[:3]])
    ),
    BadUpdate(
        "one expert alone", "did not come, .* experts of this rank are missing", NOT_SERVED, _parts(lambda o, _: [[*o.items()]])
    ),
    BadUpdate("a missing expert", f"experts.*{EXPERT} did not come, 1 of ", NOT_SERVED, _without_one_expert),
    BadUpdate(
        "the same twice", "came twice in one weight update", NOT_SERVED, _parts(lambda own, _: [list(own.items())[:2]] * 2)
    ),
    BadUpdate("a damaged file", r"w1\.scale holds 255 \(NaN\)", NOT_SERVED, _damaged_file),
    BadUpdate("an empty folder", "Failed to get weights iterator|Cannot find any model weights", UNCHANGED, _empty_folder),
    BadUpdate("no session", "must run between begin_weight_update", UNCHANGED, _no_session),
    BadUpdate("two sessions", "session is already open", UNCHANGED, _two_sessions),
)
