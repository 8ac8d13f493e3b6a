"""SigmaLLM: the whole model on one screen.

- Mamba-2 and MLA mixers in a 5 : 1 pattern (--mamba-ratio, --attention-ratio); SwiGLU after each
- pre-norm RMSNorm, no biases but the convolution's and dt's, rotary positions in MLA only
- one matrix for embedding and head, or two (--tie-embeddings)
- the loss never builds [B·T, V] logits; generation keeps a fixed Mamba state and a small MLA latent a token
- float32 weights, or matrices stored in bf16; under autocast products are bf16. The residual stream is float32 always:
  each of 2·layers small updates would otherwise be rounded to the 8 bits of the large sum (Mamba-2 does the same)

Shape legend: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from eco_llm.config import InstantConfig, SigmaConfig
from eco_llm.errors import UserError
from eco_llm.instant.coupled import coupled_values
from eco_llm.instant.stack import Stack
from eco_llm.model.block import Block, LayerCache
from eco_llm.model.linear import Linear
from eco_llm.model.mamba import Mamba
from eco_llm.model.norm import RMSNorm
from eco_llm.ops.cross_entropy import linear_cross_entropy
from eco_llm.ops.embedding import embed, tie
from eco_llm.ops.products import linear
from eco_llm.ops.ssd import choose_chunk

IGNORE = -100  # target of a token that does not count in the loss


@dataclass
class Cache:
    """State of generation for a batch of sequences, one entry a block; changed in place."""

    layers: list[LayerCache]


class SigmaLLM(nn.Module):
    """Decoder-only language model.

    Args:
        config: must pass `SigmaConfig.validate` (checked: UserError).
        weights_dtype: what matrices (2-D parameters, embedding and head too) are stored in, float32 or bfloat16; all
            else is float32. The numbers are the same float32 draws, rounded. At no time is there a float32 copy of
            more than a block.
        instant: what training keeps for backward; the coupled mode is another function of the same weights.
    """

    def __init__(
        self, config: SigmaConfig, instant: InstantConfig | None = None, *, weights_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.embedding = _store(nn.Embedding(config.vocab_size, config.d_model), weights_dtype)
        self.blocks = nn.ModuleList(_store(Block(config, mixer), weights_dtype) for mixer in config.mixer_pattern)
        self.stack = Stack(instant or InstantConfig(), config.mixer_pattern)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        # A tied head is no module of its own, so that the matrix is counted, decayed and saved once.
        self.head = None if config.tie_embeddings else _store(Linear(config.d_model, config.vocab_size), weights_dtype)
        self.reset_parameters()

    # ---- training -----------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] int64 -> logits [B, T, V]."""
        return linear(self.hidden(input_ids), self.head_weight)

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, float32 scalar: targets [B, T] are the tokens that follow input_ids [B, T].

        Targets of -100 do not count; if none counts, the loss is 0.
        """
        return self._cross_entropy(input_ids, targets, "mean")

    def loss_sum(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy in nats and the number of targets that count: two scalars on the device."""
        return self._cross_entropy(input_ids, targets, "sum"), (targets != IGNORE).sum()

    def hidden(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> normalised hidden states [B, T, D], what the head reads, in the type of products."""
        return self._trunk(self.embedding(input_ids))

    def _trunk(self, x: Tensor) -> Tensor:
        return self.final_norm.of_sum(*self.stack(self._blocks(), _at_least_float32(x)), keep_sum=True)[1]

    def review_memory(self, step: int, input_ids: Tensor) -> list[str]:
        """`Stack.review`, with input_ids [B, T] as the batch to probe with."""
        return self.stack.review(step, self._blocks(), lambda: _at_least_float32(self.embedding(input_ids)).detach())

    def _cross_entropy(self, input_ids: Tensor, targets: Tensor, reduction: Any) -> Tensor:
        table, head = tie(self.embedding.weight)  # one gradient buffer for both uses of the matrix
        x = embed(input_ids, table)
        if self.head is not None:
            head = self.head.weight
        return linear_cross_entropy(
            self._trunk(x).flatten(0, 1), head, targets.flatten(),
            chunk_tokens=self.config.loss_chunk_tokens, ignore_index=IGNORE, reduction=reduction,
        )  # fmt: skip

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))  # ModuleList forgets what it holds

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.embedding.weight if self.head is None else self.head.weight

    # ---- generation ---------------------------------------------------------------------------------------

    def init_cache(self, batch_size: int, max_tokens: int) -> Cache:
        """An empty cache for `batch_size` sequences of at most `max_tokens`, prompt included.

        It lives where the weights do, in the type their products have now (the autocast type, if on).
        """
        weight = self.embedding.weight
        device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        if torch.is_autocast_enabled(device.type) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(device.type)
        return Cache([b.mixer.init_cache(batch_size, max_tokens, device, dtype) for b in self._blocks()])

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Read T ≥ 1 tokens [B, T] into the cache; logits [B, V] for the token after the last."""
        x = _at_least_float32(self.embedding(input_ids))
        if self.stack.coupled:
            layers = zip(self._blocks(), cache.layers, strict=True)
            x = coupled_values((functools.partial(block.extend_change, cache=layer) for block, layer in layers), x)
        else:
            for block, layer in zip(self._blocks(), cache.layers, strict=True):
                x = block.extend(x, layer)
        return linear(self.final_norm(x[:, -1]), self.head_weight)

    def step(self, token_ids: Tensor, cache: Cache) -> Tensor:
        """Read one token a sequence [B]; logits [B, V] for the next."""
        return self.prefill(token_ids[:, None], cache)

    # ---- parameters, initialisation, counts ---------------------------------------------------------------

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all weights from torch's default generator: the same seed gives the same model.

        Matrices: normal of deviation 0.02, and 0.02 / sqrt(2·layers) where a product enters the residual stream,
        so that its variance does not grow with depth (GPT-2). Norms 1. Convolution: PyTorch's default, as the
        Mamba-2 reference. A, dt, D: `Mamba.reset_ssm_parameters`.
        """
        into_residual = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                _draw(module.weight, into_residual if name.endswith((".out_proj", ".mlp.down")) else 0.02)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Conv1d):
                module.reset_parameters()
            elif isinstance(module, Mamba):
                module.reset_ssm_parameters()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups, every parameter in one: dictionaries with `params`, `weight_decay` and `name`.

        "matrix": weights of hidden products; "embedding": embedding and head; both decay. "vector": norms, biases,
        A_log, dt_bias, D and the convolution (which has three axes) do not.
        """
        outer = [self.embedding.weight] + ([] if self.head is None else [self.head.weight])
        inner = [p for name, p in self.named_parameters() if not name.startswith(("embedding.", "head."))]
        return [
            {"params": [p for p in inner if p.ndim == 2], "weight_decay": weight_decay, "name": "matrix"},
            {"params": outer, "weight_decay": weight_decay, "name": "embedding"},
            {"params": [p for p in inner if p.ndim != 2], "weight_decay": 0.0, "name": "vector"},
        ]

    def update_units(self) -> list[list[nn.Parameter]]:
        """Every parameter in one of the lists, whose gradients backward completes one list after another.

        A head of its own with the norm before it; the blocks, last first; the embedding, tied or not. With a tied head
        the final norm goes with the last block, so that its gradient does not wait for the embedding's.
        """
        outer: list[nn.Parameter] = list(self.final_norm.parameters())
        units = [list(block.parameters()) for block in reversed(self.blocks)]
        if self.head is None:
            units[0] = outer + units[0]
        else:
            units.insert(0, list(self.head.parameters()) + outer)
        return [*units, list(self.embedding.parameters())]

    def num_parameters(self, embedding: bool = True) -> int:
        """Trainable numbers, a tied matrix once; without `embedding`, the token embedding and the head are left out."""
        total = sum(p.numel() for p in self.parameters())
        if embedding:
            return total
        return total - self.embedding.weight.numel() - (0 if self.head is None else self.head.weight.numel())

    def flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs (forward + backward = 3 × forward) for each of `seq_len` tokens.

        Counts multiply and add of the products that the mathematics needs, forward, for one token:

            every linear layer and the head        2 · inputs · outputs
            Mamba, chunk of L tokens               4·H·P·N (state in and out) + L·(N + H·P) (causal half inside)
            MLA, T tokens                          2·T·h·d (causal half of q·k and p·v)

        Left out, being under 1%: norms, activations, the convolution, decays, the pass of states between chunks
        (as a loop; the chunked form's product over all chunks passes 1% of the default profile near T = 12,000).
        """
        config = self.config
        chunk = min(choose_chunk(seq_len, config.mamba_chunk), seq_len)
        inner, state = config.mamba_inner_dim, config.mamba_state_dim
        linear = sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        forward = 2 * (linear + config.vocab_size * config.d_model)
        mamba_blocks = config.mixer_pattern.count("mamba")
        forward += mamba_blocks * (4 * inner * state + chunk * (state + inner))
        forward += (config.n_layers - mamba_blocks) * 2 * seq_len * config.d_model
        return 3 * forward

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile every block in place with torch.compile, for static shapes.

        Blocks of a kind share compiled graphs, and the first, which has no delta, takes one more: that is three
        compilations for training, not one a layer, and as many for each shape that validation scores (two where
        its parts of a batch are not of one size); `coupled` takes two of each (one a kind), a mix of memory modes more.
        Names in the state dict do not change. Generation (`prefill`, `step`) stays uncompiled.

        Raises:
            UserError: a pinned chunk of 256 on CUDA before torch 2.13, whose compiler cannot scan 256 tokens.
        """
        from torch._dynamo import config as dynamo

        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if self.config.mamba_chunk == 256 and self.embedding.weight.is_cuda and version < (2, 13):
            raise UserError(
                f"--mamba-chunk 256 cannot be compiled by torch {torch.__version__}:"
                " use 64 or 128, --no-torch-compile, or torch 2.13"
            )
        # Kinds of block × delta or none × with and without gradients: more graphs of one code than Dynamo's limit of 8,
        # past which it goes on uncompiled, may be needed.
        dynamo.recompile_limit = max(dynamo.recompile_limit, 32)
        for block in self._blocks():
            block.compile(dynamic=False, backend=backend)
            block.compile_parts(dynamic=False, backend=backend)


Module = TypeVar("Module", bound=nn.Module)


def _store(module: Module, dtype: torch.dtype) -> Module:
    """The module with its matrices in `dtype`."""
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype)
    return module


def _draw(weight: Tensor, deviation: float) -> None:
    """Normal numbers: the same float32 draws whatever type they are stored in."""
    if weight.dtype == torch.bfloat16:  # its own draws are others
        weight.copy_(torch.empty_like(weight, dtype=torch.float32).normal_(0.0, deviation))
    else:
        weight.normal_(0.0, deviation)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
