"""The NVIDIA Management Library, opened for the very GPU that torch calls `cuda:N`.

torch counts the GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order; NVML counts all of them in PCI order.
An index of one means nothing to the other, so the handle is found by UUID, or by PCI address. Torch-free: the
properties of the torch device are passed in.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any


class NvmlUnavailableError(Exception):
    """No NVML, no driver, or no such GPU; the message says which, in one line."""


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading; a counter that this GPU does not offer is None."""

    util_percent: float | None
    """Share of NVML's last sampling period (1/6 s to 1 s, by product) with at least one kernel running."""
    memory_used_bytes: int | None
    """Memory taken on the whole GPU, by every process."""
    power_watts: float | None
    """Board power."""


def load() -> ModuleType:
    """The initialised `pynvml` module. Every `load` needs one `nvmlShutdown`.

    Raises:
        NvmlUnavailableError: nvidia-ml-py or the driver is missing.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise NvmlUnavailableError("nvidia-ml-py is not installed") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NvmlUnavailableError(f"NVML did not start: {error}") from None
    return nvml


def text(value: str | bytes) -> str:
    """NVML's strings, which old bindings return as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


class NvmlDevice:
    """An open GPU. Close it, or use it as a context manager."""

    def __init__(self, nvml: ModuleType, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self.name = text(nvml.nvmlDeviceGetName(handle))
        self.driver = text(nvml.nvmlSystemGetDriverVersion())

    @classmethod
    def of_torch(cls, properties: Any) -> NvmlDevice:
        """Open the GPU that `properties` (`torch.cuda.get_device_properties(n)`) describes.

        Raises:
            NvmlUnavailableError: NVML is missing, or knows no such GPU.
        """
        nvml = load()
        try:
            return cls(nvml, _find(nvml, properties))
        except BaseException:
            nvml.nvmlShutdown()
            raise

    @classmethod
    def only(cls) -> NvmlDevice:
        """Open the single GPU of a machine that has exactly one (for callers that have no torch).

        Raises:
            NvmlUnavailableError: NVML is missing, or there is not exactly one GPU.
        """
        nvml = load()
        try:
            count = nvml.nvmlDeviceGetCount()
            if count != 1:
                raise NvmlUnavailableError(f"{count} GPUs, and nothing says which one is meant")
            return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(0))
        except BaseException:
            nvml.nvmlShutdown()
            raise

    def memory_total_bytes(self) -> int:
        """Size of the GPU's memory."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).total)

    def sample(self) -> GpuSample:
        """Read the counters once (some tens of microseconds to milliseconds of host time, no device work).

        Raises:
            pynvml.NVMLError: the GPU or its driver is gone.
        """
        nvml, handle = self._nvml, self._handle

        def offered(read: Any) -> Any:
            try:
                return read(handle)
            except nvml.NVMLError_NotSupported:  # e.g. utilisation of a MIG slice, power of a laptop GPU
                return None

        util = offered(nvml.nvmlDeviceGetUtilizationRates)
        memory = offered(nvml.nvmlDeviceGetMemoryInfo)
        milliwatts = offered(nvml.nvmlDeviceGetPowerUsage)
        return GpuSample(
            util_percent=None if util is None else float(util.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            power_watts=None if milliwatts is None else milliwatts / 1000.0,
        )

    def close(self) -> None:
        """Release NVML (it counts its users). Call once."""
        self._nvml.nvmlShutdown()

    def __enter__(self) -> NvmlDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _find(nvml: ModuleType, properties: Any) -> Any:
    """The NVML handle of a torch device: by UUID (a MIG slice has its own), else by PCI address."""
    uuid = getattr(properties, "uuid", None)
    candidates = [f"GPU-{uuid}", f"MIG-{uuid}"] if uuid is not None else []
    for candidate in candidates:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(candidate)
        except nvml.NVMLError:  # not this kind of UUID: try the next name of the same device
            continue
    if hasattr(properties, "pci_bus_id"):
        address = f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"
        try:
            return nvml.nvmlDeviceGetHandleByPciBusId(address)
        except nvml.NVMLError as error:
            raise NvmlUnavailableError(f"NVML knows no GPU at PCI address {address}: {error}") from None
    raise NvmlUnavailableError("torch gives neither a UUID that NVML knows nor a PCI address")
