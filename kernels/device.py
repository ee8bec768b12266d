"""Properties of a GPU that the kernels depend on. All numbers are read from the device; the name only selects measured tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hopper_moe.quantization.errors import Refusal

if TYPE_CHECKING:
    import torch

SM90 = (9, 0)
"""Compute capability of Hopper. The kernels use its WGMMA, setmaxnreg and bulk copies, which no other architecture has."""

MIN_SHARED_BYTES = 227 * 1024
"""Shared memory per block that the kernels may use (static_assert in csrc/shared_storage.cuh)."""


def is_sm90(capability: tuple[int, int] | None) -> bool:
    """Whether a device of this compute capability runs the CUDA kernels; None: no CUDA device."""
    return capability == SM90


@dataclass(frozen=True)
class Device:
    """One GPU, or one MIG slice of it. None: the device does not report the number."""

    name: str
    num_sms: int
    memory_gbps: float | None = None  # peak of the memory bus in GB/s
    clock_mhz: float | None = None  # highest SM clock
    shared_bytes: int | None = None  # most shared memory of one block

    @classmethod
    def of(cls, properties: Any) -> Device:
        """From `torch.cuda.get_device_properties`."""
        bus_bits, memory_khz = (getattr(properties, name, 0) for name in ("memory_bus_width", "memory_clock_rate"))
        gbps = 2 * memory_khz * 1e3 * bus_bits / 8 / 1e9  # double data rate
        return cls(
            properties.name,
            properties.multi_processor_count,
            round(gbps) or None,
            round(getattr(properties, "clock_rate", 0) / 1e3) or None,
            getattr(properties, "shared_memory_per_block_optin", 0) or None,
        )

    @property
    def tensor_rate(self) -> float | None:
        """SMs x MHz: tensor throughput in multiples of an SM's FLOP per cycle."""
        return self.num_sms * self.clock_mhz if self.clock_mhz else None

    def distance(self, other: Device) -> float:
        """0 for equal numbers; else the octaves between SM counts, memory bandwidths and tensor rates, those that both report."""
        pairs = (
            (self.num_sms, other.num_sms),
            (self.memory_gbps, other.memory_gbps),
            (self.tensor_rate, other.tensor_rate),
        )
        return sum(abs(math.log2(mine / theirs)) for mine, theirs in pairs if mine and theirs)

    def refusals(self, num_ranks: int = 1) -> list[str]:
        """Every reason why the fused kernel cannot run here, one sentence each; `num_ranks`: GPUs that share one layer call."""
        found = []
        if self.num_sms < num_ranks:  # CTA r sends this rank's counts to rank r
            found.append(
                f"{self.name} has {self.num_sms} SMs, but {num_ranks} ranks need {num_ranks} at least: use fewer ranks or a "
                "larger MIG slice."
            )
        if self.shared_bytes is not None and self.shared_bytes < MIN_SHARED_BYTES:
            found.append(
                f"{self.name} gives a block {self.shared_bytes} bytes of shared memory, below the {MIN_SHARED_BYTES} of the "
                "fused kernel: use HOPPER_MOE_KERNEL=w4a16 or another GPU."
            )
        return found

    def __str__(self) -> str:
        numbers = [f"{self.num_sms} SMs"]
        numbers += [f"{self.memory_gbps:.0f} GB/s"] if self.memory_gbps else []
        numbers += [f"{self.clock_mhz:.0f} MHz"] if self.clock_mhz else []
        return f"{self.name} ({', '.join(numbers)})"


def current_device() -> Device | None:
    """The current CUDA device of this process; None: no CUDA device."""
    import torch

    return Device.of(torch.cuda.get_device_properties()) if torch.cuda.is_available() else None


def require_sm90(device: torch.device | str) -> torch.device:
    """The device with its index. Raises Refusal unless the CUDA kernels run on it."""
    import torch

    found = torch.device(device)
    if found.type != "cuda" or not is_sm90(torch.cuda.get_device_capability(found)):
        raise Refusal(f"device {device} is no SM90 GPU (Hopper): use HOPPER_MOE_KERNEL=reference there.")
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())
