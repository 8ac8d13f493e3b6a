"""The op as `torch.compile` calls it: as it is. Apart from it, because the decorator imports the compiler."""

from __future__ import annotations

import torch

from eco_llm.ops.cross_entropy import linear_cross_entropy

# Compiling the loop over chunks would unroll it, for no gain: it is made of large matrix products.
linear_cross_entropy_uncompiled = torch.compiler.disable(linear_cross_entropy)
