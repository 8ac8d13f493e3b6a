"""What importing the model costs."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_model_does_not_import_the_compiler() -> None:
    """`torch._dynamo` takes a second or more, and a run without --torch-compile never needs it."""
    code = "import sys, eco_llm.model.sigma_llm; assert not {'torch._dynamo', 'torch._inductor'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
