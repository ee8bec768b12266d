"""A buffer of the same size on every rank of a group, addressable by all of them (torch.distributed._symmetric_memory).

NVLink multicast is not used: it is disabled on many hosts and can take a shared host's GPUs out of service. The kernels use only
plain loads, stores and flags through the peers' pointers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.layout import MAX_RANKS


@dataclass(frozen=True)
class RankPlace:
    """Host and GPU of a rank, and the UUIDs of visible GPUs that this GPU cannot access."""

    host: str
    uuid: str
    unreachable: tuple[str, ...]


def check_group(group: dist.ProcessGroup, device: torch.device, num_experts: int) -> None:
    """Raises Refusal, on every rank alike, unless the group's GPUs are distinct, on one host and peers of each other.

    Collective: every rank of `group` calls it. Takes no device memory.
    """
    mine = RankPlace(socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid), _unreachable(device))
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    check_places(everyone, num_experts)


def check_places(everyone: Sequence[RankPlace], num_experts: int) -> None:
    """`check_group` once every rank's place is known, in rank order."""
    num_ranks = len(everyone)
    if num_ranks > MAX_RANKS:
        raise Refusal(
            f"{num_ranks} expert-parallel ranks are above the {MAX_RANKS} that the fused exchange serves: use --ep-size "
            f"{MAX_RANKS} or less."
        )
    if num_experts % num_ranks:
        raise Refusal(
            f"{num_experts} experts do not divide into {num_ranks} expert-parallel ranks: choose a number that divides them."
        )
    hosts = sorted({place.host for place in everyone})
    if len(hosts) > 1:
        raise Refusal(
            f"the expert-parallel group spans {len(hosts)} hosts ({', '.join(hosts)}), but the fused exchange reaches GPUs of "
            "one NVLink domain only: use one expert-parallel group per host (--pp-size), or DeepEP between hosts."
        )
    owner: dict[str, int] = {}
    for rank, place in enumerate(everyone):
        if place.uuid in owner:
            raise Refusal(
                f"ranks {owner[place.uuid]} and {rank} share GPU {place.uuid}: the fused exchange needs one GPU per rank."
            )
        owner[place.uuid] = rank
    for rank, place in enumerate(everyone):
        for uuid in place.unreachable:
            if uuid in owner:
                raise Refusal(
                    f"rank {rank}'s GPU cannot access that of rank {owner[uuid]} (no NVLink peer access): the fused exchange "
                    "needs GPUs that reach each other: choose other GPUs, or HOPPER_MOE_KERNEL=w4a16, whose tokens SGLang's "
                    "collectives move."
                )


def _unreachable(device: torch.device) -> tuple[str, ...]:
    """UUIDs of this process's visible GPUs without peer access from `device`. GPUs hidden from this process are found at
    rendezvous."""
    others = (i for i in range(torch.cuda.device_count()) if i != device.index)
    return tuple(
        str(torch.cuda.get_device_properties(i).uuid) for i in others if not torch.cuda.can_device_access_peer(device.index, i)
    )


class SymmetricBuffer:
    """`num_bytes` of device memory here, and the addresses of the same buffer on all ranks.

    Without a group: ordinary memory of one rank. Collective with one: all ranks construct and destroy it together, with equal
    sizes.
    """

    def __init__(self, num_bytes: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self.num_bytes, self._group, self._handle = num_bytes, group, None
        if group is None:
            self.tensor = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self.rank, self.rank_bases = 0, [self.tensor.data_ptr()]
            return
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symmetric_memory

        self.tensor = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self.tensor, group)
        self.rank, self.rank_bases = self._handle.rank, list(self._handle.buffer_ptrs)
        if self.rank_bases[self.rank] != self.tensor.data_ptr():
            raise RuntimeError(
                "torch's symmetric memory gave this rank another address than its own tensor: report this torch version."
            )

    @property
    def num_ranks(self) -> int:
        """Ranks that share the buffer."""
        return len(self.rank_bases)

    def barrier(self) -> None:
        """Return when every rank has called it and all its earlier device work is done."""
        torch.cuda.synchronize(self.tensor.device)
        if self._group is not None:
            dist.barrier(self._group)

    def destroy(self) -> None:
        """Free the memory once no rank uses it any more. Collective; the buffer is unusable afterwards."""
        self.barrier()
        del self.tensor
        self._handle, self.rank_bases = None, []
