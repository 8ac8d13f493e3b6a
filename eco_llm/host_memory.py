"""The host's allocator, for training on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed instead of giving it back to the system; True where it will.

    A training step frees and takes the same large buffers every time. glibc unmaps the largest and trims the heap's
    end, so that each step faults its pages in again: 50,000 faults at 8 × 256 tokens of a 10M-parameter model. The
    price is that the process holds its peak until it ends. Elsewhere than with glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # Setting either one stops glibc from adapting the other, so both. Older versions take at most 32 MiB for the first.
    kept = any(mallopt(_M_MMAP_THRESHOLD, limit) for limit in (2**30, 2**25))
    return bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST)) and kept
