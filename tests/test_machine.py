"""What a machine has: NVML missing, GPUs that others use, GPUs of several kinds."""

import pynvml
import pytest
import torch

from hopper_moe.kernels.device import SM90
from hopper_moe.launch import doctor_checks, machine
from hopper_moe.launch.machine import GIB, Gpu, Machine
from hopper_moe.quantization.errors import Refusal

H200 = Gpu(0, "NVIDIA H200", SM90, 140 * GIB, 139 * GIB, 132, 18)
A100 = Gpu(0, "NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB, 79 * GIB, 108, 12)


@pytest.fixture
def no_nvml(monkeypatch):
    """A container without libnvidia-ml: what pynvml raises where the library is missing."""

    def init():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", init)


def test_without_nvml_links_are_unknown_and_said_so(no_nvml):
    """H10."""
    assert machine.active_nvlinks("0-0") is None and machine.driver_version() is None
    unknown = Gpu(0, "NVIDIA H200", SM90, 140 * GIB, 139 * GIB, 132, None)
    driver, gpu = doctor_checks.gpus(Machine((unknown,)))
    assert (driver.text, gpu.verdict) == ("unknown", doctor_checks.OK)
    assert "NVLinks unknown (NVML does not answer)" in gpu.text


def test_a_mig_slice_is_asked_for_by_its_own_uuid(monkeypatch):
    asked = []

    def by_uuid(name):
        asked.append(name)
        if name.startswith("GPU-"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return "slice"

    def state(handle, link):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", by_uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetNvLinkState", state)
    assert machine.active_nvlinks("7") == 0 and asked == ["GPU-7", "MIG-7"]


def test_one_hopper_gpu_among_others_decides():
    assert Machine((A100, H200)).is_hopper and not Machine((A100,)).is_hopper and not Machine().is_hopper
    assert Machine((A100,)).capability == (8, 0) and Machine().capability is None


def test_a_gpu_that_another_process_has_for_itself_has_no_free_memory(monkeypatch, caplog):
    def busy(index):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nlong advice")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    assert machine._free_bytes(0) == 0
    assert "GPU 0 cannot be used by this process: CUDA error: CUDA-capable device(s) is/are busy or unavailable" in caplog.text
    assert "long advice" not in caplog.text


def test_cuda_that_does_not_start_is_one_sentence(monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA driver initialization failed\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", fails)
    with pytest.raises(Refusal, match="CUDA does not start here .*failed.: name GPUs .*CUDA_VISIBLE_DEVICES"):
        machine.detect()
