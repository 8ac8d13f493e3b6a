"""errors/crash_*.json: what was happening when a run died, enough to understand it without the terminal."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from eco_llm.files import strict, write_json
from eco_llm.training.outcome import is_out_of_memory


def write_crash_report(
    folder: Path,
    error: BaseException,
    *,
    step: int,
    last_record: dict[str, Any] | None,
    config: dict[str, Any],
) -> Path:
    """Write the report and return its path; `step` is the step under way.

    It is strict JSON whatever the record and the settings hold, and needs no living device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S")
    path = folder / f"crash_{stamp}_step{step}.json"
    same_second = 1
    while path.exists():
        same_second += 1
        path = folder / f"crash_{stamp}_step{step}_{same_second}.json"
    report = {
        "kind": "out_of_memory" if is_out_of_memory(error) else "exception",
        "exception": type(error).__name__,
        "message": str(error),
        "traceback": traceback.format_exception(error),
        "step": step,
        "last_metrics": last_record,
        "memory": _memory(),
        "config": config,
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    write_json(path, strict(report, fallback=repr))
    return path


def _memory() -> dict[str, Any]:
    import psutil

    process, machine = psutil.Process().memory_info(), psutil.virtual_memory()
    memory: dict[str, Any] = {
        "host_resident_bytes": process.rss,
        "host_total_bytes": machine.total,
        "host_available_bytes": machine.available,
    }
    if torch.cuda.is_initialized():
        memory |= {  # the allocator's own counts: known even when the device is dead
            "device_allocated_bytes": torch.cuda.memory_allocated(),
            "device_reserved_bytes": torch.cuda.memory_reserved(),
            "device_peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        }
        try:
            memory["device_free_bytes"], memory["device_total_bytes"] = torch.cuda.mem_get_info()
        except RuntimeError as error:  # after an illegal access every call to the device raises
            memory["device_error"] = str(error)
    return memory
