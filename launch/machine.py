"""What this machine has: GPUs as torch sees them (so CUDA_VISIBLE_DEVICES counts), driver and missing peer links."""

from __future__ import annotations

from dataclasses import dataclass

HOPPER = (9, 0)
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
    num_nvlinks: int = 0


@dataclass(frozen=True)
class Machine:
    """`blocked_peers` are pairs (i, j) of visible GPUs where i cannot address j's memory."""

    gpus: tuple[Gpu, ...] = ()
    blocked_peers: tuple[tuple[int, int], ...] = ()
    driver: str | None = None

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability that kernels are chosen for; None without a CUDA device."""
        return self.gpus[0].capability if self.gpus else None

    @property
    def is_hopper(self) -> bool:
        return self.capability == HOPPER


def detect() -> Machine:
    """Ask torch about every visible GPU. Takes no device memory beyond the CUDA context of this process."""
    import torch

    if not torch.cuda.is_available():
        return Machine(driver=driver_version())
    count = torch.cuda.device_count()
    gpus = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            Gpu(
                index,
                properties.name,
                (properties.major, properties.minor),
                total,
                free,
                properties.multi_processor_count,
                active_nvlinks(str(properties.uuid)),
            )
        )
    blocked = tuple((i, j) for i in range(count) for j in range(count) if i != j and not torch.cuda.can_device_access_peer(i, j))
    return Machine(tuple(gpus), blocked, driver_version())


def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()


def active_nvlinks(uuid: str) -> int:
    """Number of NVLink links that are up on the GPU with this UUID (as torch gives it); 0 also where there is no NVLink."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        links = 0
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            try:
                links += pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED
            except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument):
                break  # past this GPU's last link
        return links
    finally:
        pynvml.nvmlShutdown()
