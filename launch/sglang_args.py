"""The few SGLang arguments that decide whether a launch can work. SGLang parses them all again; this only reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from hopper_moe.moe_backends.arguments import BACKEND, UNSUPPORTED
from hopper_moe.moe_backends.errors import Refusal


@dataclass(frozen=True)
class LaunchPlan:
    """A launch as asked for. Sizes are numbers of ranks; `chunked_prefill_size` is per rank, None: SGLang's default."""

    model: str
    tp_size: int = 1
    ep_size: int = 1
    attn_dp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1  # replicas of the whole model; attention data parallelism is none
    moe_a2a_backend: str = "none"
    chunked_prefill_size: int | None = None
    base_gpu_id: int = 0
    gpu_id_step: int = 1
    device: str | None = None
    host: str = "127.0.0.1"
    port: int = 30000
    sglang_args: tuple[str, ...] = ()

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas. SGLang numbers them group by group: `tp_size` neighbours hold one stage of one replica."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def gpu_ids(self) -> list[int]:
        """The GPU of every rank as SGLang numbers them, `--base-gpu-id` and `--gpu-id-step` included."""
        return [
            self.base_gpu_id + (replica * self.pp_size * self.gpu_id_step + stage) * self.tp_size + rank * self.gpu_id_step
            for replica in range(self.dp_size)
            for stage in range(self.pp_size)
            for rank in range(self.tp_size)
        ]

    def on_one_process(self) -> LaunchPlan:
        """The same launch on the embedded CPU host: one rank, no prefill chunks."""
        one_rank = dict.fromkeys(("tp_size", "ep_size", "attn_dp_size", "pp_size", "dp_size"), 1)
        return replace(self, **one_rank, moe_a2a_backend="none", chunked_prefill_size=None)

    def not_for_cpu(self) -> list[str]:
        """Arguments of this launch that mean nothing to the embedded CPU host."""
        host = _Parser(add_help=False, allow_abbrev=False)
        for name in ("--host", "--port", "--device", "--moe-runner-backend"):
            host.add_argument(name)
        return host.parse_known_args(list(self.sglang_args))[1]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(f"arguments: {message}.")


def _whole(low: int, high: int):
    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in {low}..{high}")
        return int(text)

    return parse


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--tp-size", "--tensor-parallel-size", "--tp", type=_whole(1, 1024), default=1)
    parser.add_argument("--ep-size", "--expert-parallel-size", "--ep", type=_whole(1, 1024))
    parser.add_argument("--pp-size", "--pipeline-parallel-size", type=_whole(1, 1024), default=1)
    parser.add_argument("--dp-size", "--data-parallel-size", "--dp", type=_whole(1, 1024), default=1)
    parser.add_argument("--attn-dp-size", "--attention-data-parallel-size", type=_whole(1, 1024), default=1)
    parser.add_argument("--enable-dp-attention", action="store_true")
    parser.add_argument("--base-gpu-id", type=_whole(0, 1024), default=0)
    parser.add_argument("--gpu-id-step", type=_whole(1, 1024), default=1)
    parser.add_argument("--nnodes", type=_whole(1, 1024), default=1)
    parser.add_argument("--chunked-prefill-size", type=_whole(-1, 1 << 24))
    parser.add_argument("--moe-runner-backend", default=BACKEND)
    parser.add_argument("--moe-a2a-backend", default="none")
    parser.add_argument("--quantization")
    parser.add_argument("--config")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_whole(1, 65535), default=30000)
    for field, flag, _ in UNSUPPORTED:  # bare flags, or values of any kind
        parser.add_argument(flag, dest=field, nargs="*")
    return parser


def parse(model: str, arguments: Sequence[str]) -> tuple[LaunchPlan, list[str]]:
    """Read a launch from `hopper-moe serve MODEL arguments...`; the list holds one sentence per argument we refuse."""
    read, _ = _parser().parse_known_args(list(arguments))
    problems = []
    if read.model_path is not None:
        problems.append(f"--model-path {read.model_path} is given beside MODEL {model}: name the model once.")
    if read.config is not None:
        problems.append(
            f"--config {read.config} holds arguments that these checks would not see: give them on the command line or use "
            f"`sglang serve` with --moe-runner-backend {BACKEND}."
        )
    if read.moe_runner_backend != BACKEND:
        problems.append(f"--moe-runner-backend {read.moe_runner_backend} is not this plugin: leave it out or use `sglang serve`.")
    if read.moe_a2a_backend not in ("none", "megamoe"):
        problems.append(
            f"--moe-a2a-backend {read.moe_a2a_backend} does not go with {BACKEND}, which takes tokens in SGLang's "
            "standard layout: leave it out."
        )
    if read.quantization not in (None, "fp8"):
        problems.append(f"--quantization {read.quantization} does not fit: DeepSeek-V4 checkpoints declare fp8, leave it out.")
    if read.nnodes > 1:
        problems.append(
            f"--nnodes {read.nnodes} needs a network between GPUs: this kernel works inside one node, "
            "start a server of its own on each."
        )
    for field, flag, reason in UNSUPPORTED:
        if getattr(read, field) not in (None, ["0"]):  # 0 switches off what takes a size, as the plugin reads it
            problems.append(f"{flag} cannot run with --moe-runner-backend {BACKEND}, {reason}: leave it out.")
    ep_size = read.ep_size if read.ep_size is not None else 1
    if read.tp_size % ep_size:
        problems.append(f"--ep-size {ep_size} does not divide --tp-size {read.tp_size}: use {read.tp_size} or leave it out.")
    attn_dp, replicas = _data_parallel(read)
    if read.tp_size % attn_dp:
        problems.append(f"{attn_dp} attention data-parallel ranks do not divide --tp-size {read.tp_size}: use a divisor.")
    chunk = read.chunked_prefill_size
    if chunk == 0:
        problems.append("--chunked-prefill-size 0 means nothing: give a number of tokens, or -1 to switch it off.")
    per_rank = None if chunk is None or chunk <= 0 else max(1, chunk // attn_dp)  # as SGLang divides it
    plan = LaunchPlan(
        model=model,
        tp_size=read.tp_size,
        ep_size=ep_size,
        attn_dp_size=attn_dp,
        pp_size=read.pp_size,
        dp_size=replicas,
        moe_a2a_backend=read.moe_a2a_backend,
        chunked_prefill_size=per_rank,
        base_gpu_id=read.base_gpu_id,
        gpu_id_step=read.gpu_id_step,
        device=read.device,
        host=read.host,
        port=read.port,
        sglang_args=tuple(arguments),
    )
    return plan, problems


def _data_parallel(read: argparse.Namespace) -> tuple[int, int]:
    """(attention data-parallel ranks, replicas of the model). The older --enable-dp-attention makes the former of --dp-size."""
    if read.enable_dp_attention and read.attn_dp_size == 1:
        return read.dp_size, 1
    return read.attn_dp_size, read.dp_size
