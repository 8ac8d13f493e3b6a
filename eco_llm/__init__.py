"""eco-llm: train the biggest small language model one memory-limited GPU can hold, with evidence.

Public names: `SigmaConfig`, `SigmaLLM`, `C3O`. They are loaded on first use, so that `import eco_llm` and
`eco_train --help` do not pay for importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eco_llm.version import __version__

if TYPE_CHECKING:
    from eco_llm.config import SigmaConfig
    from eco_llm.model.sigma_llm import SigmaLLM
    from eco_llm.optim.c3o import C3O

__all__ = ["C3O", "SigmaConfig", "SigmaLLM", "__version__"]

_HOME = {
    "SigmaConfig": "eco_llm.config",
    "SigmaLLM": "eco_llm.model.sigma_llm",
    "C3O": "eco_llm.optim.c3o",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'eco_llm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
