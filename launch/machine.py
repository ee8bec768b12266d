"""Hardware of this machine: GPUs as torch sees them (CUDA_VISIBLE_DEVICES applies), driver, missing peer access."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from hopper_moe.kernels.device import Device, is_sm90
from hopper_moe.quantization.errors import Refusal

logger = logging.getLogger("hopper_moe")

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One visible CUDA device; `capability` is (major, minor), memory in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    num_sms: int
    num_nvlinks: int | None = 0  # None: unknown, NVML does not answer
    memory_gbps: float | None = None
    clock_mhz: float | None = None
    shared_bytes: int | None = None

    @property
    def device(self) -> Device:
        """The properties that kernels depend on."""
        return Device(self.name, self.num_sms, self.memory_gbps, self.clock_mhz, self.shared_bytes)

    @property
    def nvlinks(self) -> str:
        return "NVLinks unknown (NVML does not answer)" if self.num_nvlinks is None else f"{self.num_nvlinks} NVLinks up"


@dataclass(frozen=True)
class Machine:
    """`blocked_peers` are pairs (i, j) of visible GPUs where i cannot address j's memory."""

    gpus: tuple[Gpu, ...] = ()
    blocked_peers: tuple[tuple[int, int], ...] = ()
    driver: str | None = None

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability that kernels are chosen for; None without a CUDA device. With a Hopper GPU among others it is
        Hopper's; a launch that would use the others is refused with their names."""
        found = [gpu.capability for gpu in self.gpus]
        return next((capability for capability in found if is_sm90(capability)), found[0] if found else None)

    @property
    def is_hopper(self) -> bool:
        return is_sm90(self.capability)


def detect() -> Machine:
    """Query torch for every visible GPU. Takes no device memory except the CUDA context of this process.

    Raises Refusal when CUDA does not start.
    """
    import torch

    if not torch.cuda.is_available():
        return Machine(driver=driver_version())
    try:
        count = torch.cuda.device_count()
        gpus = tuple(_gpu(index, torch.cuda.get_device_properties(index)) for index in range(count))
        blocked = tuple(
            (i, j) for i in range(count) for j in range(count) if i != j and not torch.cuda.can_device_access_peer(i, j)
        )
    except RuntimeError as error:
        raise Refusal(
            f"CUDA does not start here ({_first_line(error)}): name GPUs that are free and healthy with CUDA_VISIBLE_DEVICES."
        ) from None
    return Machine(gpus, blocked, driver_version())


def _gpu(index: int, properties: Any) -> Gpu:
    """One visible GPU, from its torch properties."""
    device = Device.of(properties)
    return Gpu(
        index,
        device.name,
        (properties.major, properties.minor),
        properties.total_memory,
        _free_bytes(index),
        device.num_sms,
        active_nvlinks(str(properties.uuid)),
        device.memory_gbps,
        device.clock_mhz,
        device.shared_bytes,
    )


def _free_bytes(index: int) -> int:
    """Free memory in bytes; 0, with one log line, for a GPU that is full or in exclusive use by another process."""
    import torch

    try:
        return torch.cuda.mem_get_info(index)[0]
    except RuntimeError as error:
        logger.warning("GPU %d cannot be used by this process: %s", index, _first_line(error))
        return 0


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without a driver or without NVML (a container without libnvidia-ml)."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def active_nvlinks(uuid: str) -> int | None:
    """Number of NVLink links that are up on the GPU or MIG slice with this UUID (as torch gives it); 0 also where there is no
    NVLink. None: NVML is missing or does not know the GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return _count_nvlinks(_nvml_handle(uuid))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _nvml_handle(uuid: str) -> Any:
    import pynvml

    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _count_nvlinks(handle: Any) -> int:
    import pynvml

    links = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            links += pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument):
            break  # past this GPU's last link
    return links
