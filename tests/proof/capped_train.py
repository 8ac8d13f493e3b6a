"""`eco_train` that may take only so much of the GPU's memory: ECO_TEST_CAP_GIB, as a smaller card has."""

from __future__ import annotations

import os
import sys

from eco_llm.cli.main import main
from eco_llm.runtime import set_cache_dirs

set_cache_dirs()  # before torch
import torch  # noqa: E402

if cap := os.environ.get("ECO_TEST_CAP_GIB"):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(float(cap) * 2**30 / total)
sys.exit(main(sys.argv[1:]))
