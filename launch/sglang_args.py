"""SGLang's arguments of a launch, read by SGLang's own parser, including abbreviations, --config files and defaults."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.moe_backends.sglang.plan import BACKEND
from hopper_moe.quantization.errors import Refusal


@dataclass(frozen=True)
class Launch:
    """A requested launch on Hopper GPUs; `arguments` are the user's, unparsed."""

    model: str
    view: LaunchView
    arguments: tuple[str, ...]

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas on this host. SGLang numbers them group by group: `tp_size` neighbours hold one stage."""
        return self.view.ranks_per_node * self.view.num_replicas

    @property
    def gpu_stages(self) -> list[tuple[int, int]]:
        """(GPU, pipeline stage) of every rank of this host as SGLang numbers the GPUs, --base-gpu-id and --gpu-id-step
        included."""
        args, view = self.view.args, self.view
        tp_size = min(args.tp_size, view.ranks_per_node)
        stages = view.local_stages
        return [
            (args.base_gpu_id + (replica * len(stages) * args.gpu_id_step + place) * tp_size + rank * args.gpu_id_step, stage)
            for replica in range(view.num_replicas)
            for place, stage in enumerate(stages)
            for rank in range(tp_size)
        ]

    @property
    def gpu_ids(self) -> list[int]:
        """The GPU of every rank of this host."""
        return [number for number, _ in self.gpu_stages]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(f"arguments: {message}; `sglang serve --help` lists them.")


def parse(model: str, arguments: Sequence[str]) -> Launch:
    """Read a launch of `hopper-moe serve MODEL arguments...`. Raises `Refusal` for arguments that SGLang's parser refuses."""
    if importlib.util.find_spec("sglang") is None:
        raise Refusal(
            "sglang, which does the serving on a Hopper machine, is not installed: pip install 'sglang-hopper-moe[sglang]'."
        )
    from sglang.srt.server_args import ServerArgs

    from hopper_moe.moe_backends.sglang import compat

    compat.register_choice()
    parser = _Parser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    before = dict(os.environ)
    try:
        read = parser.parse_args(_with_config(parser, ["--model-path", model, "--moe-runner-backend", BACKEND, *arguments]))
        args = ServerArgs.from_cli_args(read)
    except (ValueError, AssertionError, OSError) as error:
        raise error if isinstance(error, Refusal) else Refusal(f"arguments: {error}.") from None
    finally:  # the server reads the user's environment, without what parsing has changed in it
        os.environ.clear()
        os.environ.update(before)
    if args.model_path != model:
        raise Refusal(f"--model-path {args.model_path} is given beside MODEL {model}: name the model once.")
    return Launch(model, LaunchView(args, is_resolved=False), tuple(arguments))


def _with_config(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """The arguments of a --config file merged in, as SGLang does it."""
    if "--config" not in argv:
        return argv
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    return ConfigArgumentMerger(parser).merge_config_with_args(argv)
