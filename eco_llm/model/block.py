"""A block: two sub-layers, each `x + f(x)` with f = (norm → mixer) or (norm → MLP)."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eco_llm.config import SigmaConfig
from eco_llm.instant.replay import SubLayer
from eco_llm.model.mamba import Mamba, MambaCache
from eco_llm.model.mla import MLA, MLACache
from eco_llm.model.mlp import SwiGLU
from eco_llm.model.norm import RMSNorm
from eco_llm.ops.quantize import Keep

LayerCache = MambaCache | MLACache


class Block(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)). `mix` and `feed` are the two f's, pure functions of x.

    A block leaves the sum at its end to the next block's norm, which makes it in its own pass over the stream, forward
    and backward (`ops/add_norm`): what goes from block to block is a pair (x, delta) that stands for x + delta.
    """

    def __init__(self, config: SigmaConfig, mixer: Literal["mamba", "mla"]) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer: Mamba | MLA = Mamba(config) if mixer == "mamba" else MLA(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)
        self._compiled: tuple[SubLayer, SubLayer] | None = None

    def mix(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.mixer(self.mixer_norm(x))

    def feed(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.mlp(self.mlp_norm(x))

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x, delta) -> (x, delta), all [B, T, D]; no delta is 0.

        Of the stream itself two tensors are kept, the sum that enters and what the mixer adds to it.
        """
        x, u = self.mixer_norm.of_sum(x, delta, keep_sum=True)
        x, v = self.mlp_norm.of_sum(x, self.mixer(u), keep_sum=False)
        return x, self.mlp(v)

    def writes_codes(self, x: Tensor, keep: Keep) -> bool:
        """Whether `coded` serves the stream x [B, T, D]."""
        return self.mlp.writes_codes(x, keep) and (
            not isinstance(self.mixer, Mamba) or self.mixer.writes_codes(x, keep)
        )

    def coded(self, x: Tensor, delta: Tensor | None, keep: Keep) -> tuple[Tensor, Tensor]:
        """`forward` of x + delta as a pair whose sum is the result, all [B, T, D], no delta being 0; for a Mamba mixer.

        Codes of activations and nothing else of them are kept for backward; `keep` has their bits, and the counter of
        the random numbers. Never compiled: all that a compiler would fuse is in kernels.
        """
        assert isinstance(self.mixer, Mamba)
        return self.coded_feed(*self.mixer.coded(x, delta, self.mixer_norm, keep), keep)

    def coded_feed(self, x: Tensor, delta: Tensor | None, keep: Keep) -> tuple[Tensor, Tensor]:
        """The second half of `coded`, for any mixer."""
        return self.mlp.coded(x, delta, self.mlp_norm, keep)

    def watched(self, x: Tensor, seen: contextlib.AbstractContextManager[Any]) -> Tensor:
        """x [B, T, D] -> the result [B, T, D]. Inside `seen` runs what keeps the tensors that `coded`, or `coded_feed`
        after an MLA mixer, has as codes: not the norms, which keep the stream here and codes of their results there.
        """
        u = self.mixer_norm(x)
        with seen if isinstance(self.mixer, Mamba) else contextlib.nullcontext():
            mixed = self.mixer(u)
        x = x + mixed
        v = self.mlp_norm(x)
        with seen:
            fed = self.mlp(v)
        return x + fed

    @property
    def sub_layers(self) -> tuple[SubLayer, SubLayer]:
        """(mix, feed), as training calls them: compiled if `compile_sub_layers` was."""
        return self._compiled or (self.mix, self.feed)

    def compile_sub_layers(self, **options: Any) -> None:
        """Compile mix and feed each for itself, with `torch.compile`'s options; `forward` stays as it is."""
        self._compiled = torch.compile(self.mix, **options), torch.compile(self.feed, **options)

    def extend_mix(self, x: Tensor, cache: LayerCache) -> Tensor:
        """`mix` for the next T tokens after those in `cache`, which takes them in."""
        return self.mixer.extend(self.mixer_norm(x), cache)  # type: ignore[arg-type]  # built for this mixer

    def extend(self, x: Tensor, cache: LayerCache) -> Tensor:
        """The block for the next T tokens after those in `cache`, which takes them in; x and result [B, T, D]."""
        x = x + self.extend_mix(x, cache)
        return x + self.feed(x)
