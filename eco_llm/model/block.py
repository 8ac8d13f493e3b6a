"""A block: two sub-layers, each `x + f(x)` with f = (norm → mixer) or (norm → MLP)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eco_llm.config import SigmaConfig
from eco_llm.instant.compression import FourBitError
from eco_llm.instant.replay import SubLayer, Twice
from eco_llm.model.mamba import Mamba, MambaCache
from eco_llm.model.mla import MLA, MLACache
from eco_llm.model.mlp import SwiGLU
from eco_llm.model.norm import RMSNorm
from eco_llm.ops.add_up import Ahead
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
        self._compiled: dict[str, Callable[..., Any]] = {}

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
        x, v = self.to_mlp(x, delta)
        return x, self.mlp(v)

    def to_mlp(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward` up to the MLP: (the stream, what the MLP reads of it), both [B, T, D]."""
        x, u = self.mixer_norm.of_sum(x, delta, keep_sum=True)
        return self.mlp_norm.of_sum(x, self.mixer(u), keep_sum=False)

    def to_change(self, x: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
        """(what the mixer adds to x, what the MLP reads), all [B, T, D]; the mixer's x is `again`."""
        mixed = self.mixer(self.mixer_norm.alone(again))
        return mixed, self.mlp_norm.alone(x, mixed)

    def writes_codes(self, x: Tensor, keep: Keep) -> bool:
        """Whether `coded` serves the stream x [B, T, D]."""
        return self.mlp.writes_codes(x, keep) and (
            not isinstance(self.mixer, Mamba) or self.mixer.writes_codes(x, keep)
        )

    def coded(self, x: Tensor, delta: Tensor | None, keep: Keep) -> tuple[Tensor, Tensor]:
        """`forward` of x + delta as a pair whose sum is the result, all [B, T, D], no delta being 0.

        Codes of activations and nothing else of them are kept for backward; `keep` has their bits, and the counter of
        the random numbers. Never compiled as a whole: what a compiler would fuse is in kernels, but for attention's.
        """
        norm = self.mixer_norm
        if isinstance(self.mixer, Mamba):
            x, mixed = self.mixer.coded(x, delta, norm, keep)
        else:
            from eco_llm.instant.coded import recompute_from_codes  # imports Triton

            x, mixed = recompute_from_codes(self._attention, x, delta, norm.weight.float(), norm.eps, keep=keep)
        return self.mlp.coded(x, mixed, self.mlp_norm, keep)

    def watched(self, x: Tensor, seen: FourBitError) -> Tensor:
        """x [B, T, D] -> the result [B, T, D]. Inside `seen` runs what keeps the tensors that `coded` has as codes: not
        the norms, which keep the stream here and codes of their results there, and no MLA mixer, whose input is shown.
        """
        u = self.mixer_norm(x)
        if isinstance(self.mixer, Mamba):
            with seen:
                mixed = self.mixer(u)
        else:
            seen.add(u)
            mixed = self.mixer(u)
        x = x + mixed
        v = self.mlp_norm(x)
        with seen:
            fed = self.mlp(v)
        return x + fed

    @property
    def sub_layers(self) -> tuple[SubLayer, SubLayer]:
        """(mix, feed), as training calls them: compiled if `compile_parts` was."""
        return self._part("mix"), self._part("feed")

    def change(self, x: Tensor, again: Tensor, ahead: Ahead | None = None) -> tuple[Tensor, Tensor]:
        """(x, x again) -> what mixer and MLP add to it, [B, T, D] each; x may be narrower than the stream. Of a second
        run, which knows its gradients `ahead`, passes over the stream and the MLP's channels serve both ways.
        """
        if ahead is None:
            mixed, v = self._part("to_change")(x, again)
            return mixed, self.mlp(v)
        if "to_change" in self._compiled:  # the graph of forward, or the numbers might be others
            mixed, v = self._compiled["to_change"](x, again)
            return mixed, self.mlp.foreseen(v, ahead.result)
        x, u = self.mixer_norm.forked(again, ahead)
        mixed = self.mixer(u)
        v = self.mlp_norm.alone(x, mixed, ahead.result)  # sends on what the mixer's result receives
        return mixed.detach(), self.mlp.foreseen(v, ahead.result)

    @property
    def whole(self) -> Twice:
        """The block of x alone, [B, T, D] -> [B, T, D]; for gradients without the MLP's value, and without the sum."""
        to_mlp = self._part("to_mlp")

        def value(x: Tensor) -> Tensor:
            x, v = to_mlp(x)
            return x + self.mlp(v)

        def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
            x, v = to_mlp(x)
            return x, self.mlp.unread(v)

        return Twice(value, gradients)

    @property
    def mixing(self) -> Twice:
        """`mix` of an MLA mixer; for gradients without its last product."""
        value, gradients = self._attention
        return Twice(lambda x: value(self.mixer_norm(x)), lambda x: gradients(self.mixer_norm(x)))

    @property
    def _attention(self) -> Twice:
        """An MLA mixer, of what its norm gives."""
        assert isinstance(self.mixer, MLA)
        attend, out_proj = self._compiled.get("attend") or self.mixer.attend, self.mixer.out_proj
        return Twice(lambda u: out_proj(attend(u)), lambda u: (out_proj.unread(attend(u)),))

    def compile_parts(self, **options: Any) -> None:
        """Compile what memory modes call of a block, each for itself and not before it is called, with
        `torch.compile`'s options; `forward` stays as it is."""
        for name in ("mix", "feed", "to_mlp", "to_change"):
            self._compiled[name] = torch.compile(getattr(self, name), **options)
        if isinstance(self.mixer, MLA):
            self._compiled["attend"] = torch.compile(self.mixer.attend, **options)

    def _part(self, name: str) -> Callable[..., Any]:
        return self._compiled.get(name) or getattr(self, name)

    def extend_change(self, x: Tensor, again: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """`change` for the next T tokens after those in `cache`, which takes them in."""
        mixed = self.mixer.extend(self.mixer_norm.alone(again), cache)  # type: ignore[arg-type]  # built for this mixer
        return mixed, self.mlp(self.mlp_norm.alone(x, mixed))

    def extend(self, x: Tensor, cache: LayerCache) -> Tensor:
        """The block for the next T tokens after those in `cache`, which takes them in; x and result [B, T, D]."""
        x = x + self.mixer.extend(self.mixer_norm(x), cache)  # type: ignore[arg-type]  # built for this mixer
        return x + self.feed(x)
