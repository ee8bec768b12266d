"""Runs a function on several GPUs of this machine, one process each, with a NCCL group between them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hopper_moe.quantization.errors import Refusal


def check_ranks(num_ranks: int) -> None:
    """Raises Refusal unless this machine has that many GPUs."""
    if not 1 <= num_ranks <= torch.cuda.device_count():
        raise Refusal(f"--ranks {num_ranks}: this machine has {torch.cuda.device_count()} GPUs.")


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(group, *arguments)` on GPU r in process r; what each returned, by rank. Any rank's exception ends all and is
    raised here.

    `function` and its arguments must be picklable; so must the results.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_on_ranks(num_ranks, folder, function, *arguments)
        while not context.join():
            pass
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def start_on_ranks(num_ranks: int, folder: str, function: Callable[..., Any], *arguments: Any) -> mp.ProcessContext:
    """The running processes; rank r's result is saved as `<folder>/r.pt`."""
    check_ranks(num_ranks)
    return mp.spawn(_enter, (num_ranks, folder, function, arguments), nprocs=num_ranks, join=False)


def _enter(rank: int, num_ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast: see kernels/symmetric.py
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    # Ranks meet at a file: a free port may be taken by another process before rank 0 listens on it.
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks, device_id=device)
    torch.save(function(dist.group.WORLD, *arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
