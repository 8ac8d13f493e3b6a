"""GPU counters against a fake NVML that counts GPUs in another order than torch."""

from __future__ import annotations

import logging
import mmap
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from eco_llm.perf import nvml as nvml_module
from eco_llm.perf.device_counters import DeviceCounters, DeviceReading, memory_stats
from eco_llm.perf.nvml import GpuSample, NvmlDevice, NvmlUnavailableError


class FakeNvml(ModuleType):
    """Two GPUs; the handle of one is its UUID."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.users = 0
        self.count = 2
        self.by_pci = {"00000000:41:00.0": "GPU-bbb"}
        self.utilization: dict[str, int | None] = {"GPU-aaa": 11, "GPU-bbb": 77}

    def nvmlInit(self) -> None:
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.utilization:
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetHandleByPciBusId(self, address: str) -> str:
        if address not in self.by_pci:
            raise self.NVMLError("not found")
        return self.by_pci[address]

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.utilization)[index]

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return f"Fake {handle}".encode()

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.0"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        value = self.utilization[handle]
        if value is None:
            raise self.NVMLError_NotSupported
        return SimpleNamespace(gpu=value)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=3 * 2**30, total=8 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 250_500


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def torch_gpu(uuid: str | None = "bbb", bus: int = 0x41) -> SimpleNamespace:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=bus, pci_device_id=0)
    if uuid is not None:
        properties.uuid = uuid
    return properties


@pytest.mark.parametrize("properties", [torch_gpu(), torch_gpu(uuid=None), torch_gpu(uuid="zzz")])
def test_the_gpu_is_torchs_and_not_nvmls_first(fake_nvml: FakeNvml, properties: SimpleNamespace) -> None:
    with NvmlDevice.of_torch(properties) as gpu:
        assert (gpu.name, gpu.driver) == ("Fake GPU-bbb", "580.0")
        assert gpu.sample() == GpuSample(77.0, 3 * 2**30, 250.5)
    assert fake_nvml.users == 0


def test_unknown_gpu_and_missing_nvml_say_why(fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NvmlUnavailableError, match=r"00000000:99:00\.0"):
        NvmlDevice.of_torch(torch_gpu(uuid=None, bus=0x99))
    with pytest.raises(NvmlUnavailableError, match="2 GPUs"):
        NvmlDevice.only()
    assert fake_nvml.users == 0

    def no_driver() -> None:
        raise FakeNvml.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(fake_nvml, "nvmlInit", no_driver)
    with pytest.raises(NvmlUnavailableError, match="Driver Not Loaded"):
        nvml_module.load()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlUnavailableError, match="nvidia-ml-py"):
        nvml_module.load()


def test_a_counter_the_gpu_does_not_offer_is_none(fake_nvml: FakeNvml) -> None:
    fake_nvml.utilization["GPU-bbb"] = None
    with NvmlDevice.of_torch(torch_gpu()) as gpu:
        assert gpu.sample() == GpuSample(None, 3 * 2**30, 250.5)


def test_only_gpu_without_torch(fake_nvml: FakeNvml) -> None:
    fake_nvml.count = 1
    with NvmlDevice.only() as gpu:
        assert gpu.memory_total_bytes() == 8 * 2**30


def source(samples: list[GpuSample]) -> Any:
    """A source that gives `samples` in turn, the last one for ever."""

    def sample() -> GpuSample:
        return samples.pop(0) if len(samples) > 1 else samples[0]

    return lambda: (sample, lambda: None)


def test_reading_is_the_statistics_since_the_last_read() -> None:
    gib = 2**30
    samples = [GpuSample(50.0, 2 * gib, 100.0), GpuSample(100.0, gib, 300.0), GpuSample(None, None, None)]
    counters = DeviceCounters("cuda", open_source=source(samples))
    counters.sample_now()
    counters.sample_now()
    assert counters.read() == DeviceReading(75.0, 2.0, 200.0, samples=2)
    assert counters.read() == DeviceReading(None, None, None, samples=0)
    counters.sample_now()
    assert counters.read() == DeviceReading(None, None, None, samples=1)


def test_sampling_runs_in_the_background_and_stops() -> None:
    with DeviceCounters("cuda", hz=200.0, open_source=source([GpuSample(90.0, 1, 1.0)])) as counters:
        deadline = time.monotonic() + 10
        while counters._samples < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        reading = counters.read()
    assert reading.samples >= 3
    assert reading.gpu_util_percent == 90.0
    assert "eco-device-counters" not in [thread.name for thread in threading.enumerate()]
    counters.stop()


def test_a_gpu_lost_while_sampling_is_said_and_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    def lost() -> GpuSample:
        raise FakeNvml.NVMLError("GPU is lost")

    with caplog.at_level(logging.WARNING), DeviceCounters("cuda", open_source=lambda: (lost, lambda: None)) as c:
        assert c._thread is not None
        c._thread.join(10)
        assert c.read().gpu_util_percent is None
    assert c.unavailable == "sampling stopped: GPU is lost"
    assert "GPU is lost" in caplog.text


def test_cpu_has_no_counters_and_no_thread() -> None:
    with DeviceCounters("cpu") as counters:
        assert counters.read() == DeviceReading()
        assert counters.unavailable == "cpu is not a CUDA device"
        assert counters._thread is None


def test_process_memory_peaks() -> None:
    before = memory_stats("cpu")
    # Pages of its own: a block of the heap may be one that an earlier test freed and the process has kept.
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(b"x" * len(block))
        after = memory_stats("cpu")
    assert set(after) == {"process_rss_gib", "process_peak_rss_gib"}
    assert before["process_rss_gib"] is not None
    assert after["process_peak_rss_gib"] is not None
    assert after["process_peak_rss_gib"] >= before["process_rss_gib"] + 0.06 - 1e-3


@pytest.mark.gpu
def test_real_gpu_counters() -> None:
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with DeviceCounters("cuda") as counters:
        assert counters.unavailable is None
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            for _ in range(50):
                x @ x
            torch.cuda.synchronize()
        reading = counters.read()
    assert reading.samples >= 5
    assert reading.gpu_util_percent is None or reading.gpu_util_percent > 30.0
    assert reading.gpu_memory_used_gib is not None
    assert reading.gpu_memory_used_gib > 0.03
    stats = memory_stats("cuda")
    assert stats["gpu_memory_peak_gib"] is not None
    assert stats["gpu_memory_peak_gib"] >= 2 * 4096 * 4096 / 2**30
