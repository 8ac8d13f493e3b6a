"""The host's allocator."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

LARGE = """
import resource, sys, torch
from eco_llm.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.zeros(12 * 2**20) for _ in range(4)]  # 48 MiB each: above the 32 MiB to which glibc adapts
for _ in range(5):  # kept memory first grows into one piece
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the GNU C library's allocator")
def test_buffers_of_the_last_step_are_used_again_without_page_faults() -> None:
    def faults(how: str) -> int:
        result = subprocess.run([sys.executable, "-c", LARGE, how], check=True, capture_output=True, text=True)
        return int(result.stdout)

    assert faults("keep") < 0.1 * faults("leave")
