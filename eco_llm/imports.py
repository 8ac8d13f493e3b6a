"""No garbage collection interrupts the import of thousands of modules. Torch-free, for it comes before torch.

Figures: docs/LOG.md; `benchmarks/start_time.py` measures them.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing(package: str, *, freeze: bool) -> Iterator[None]:
    """For the import of thousands of modules: no collection interrupts it.

    Their objects stay as long as the process, some hundred thousand, and collections that found nothing among them took
    a tenth of a start. Where `package` is there already, nothing is done: then others have run.

    Args:
        package: what will be imported.
        freeze: no later collection looks at what is alive at the end either; what is garbage before is collected first.
            For a process that is ours alone: of what its caller holds then, nothing in a cycle would ever be freed.
    """
    if package in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    if freeze:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if enabled:
            gc.enable()
