"""Claim: our SSD and Mamba mixer against mamba_ssm's kernels, at D = 768, N = 128, 16 × 1024 tokens, bf16.

    python benchmarks/mamba_mixer.py --peer PATH [--rounds N]

PATH is a checkout of mamba; only its Triton kernels are used (peers.py), so no compiled extension is needed.

ssd:    x [16, 1024, 24, 64], N = 128, forward and forward + backward; ours against mamba_chunk_scan_combined at
        chunk 64, 128 and 256, each pair interleaved.
mixer:  the whole mixer against one of the peer's pieces (conv1d, SSD with softplus, gated RMSNorm) at its fastest
        chunk; and an SDPA attention mixer of the same width as the yardstick.

Both sides of a pair are CUDA graphs of the same work, replayed: kernels, not launching. One pair more, `mixer
launched`, is what a program without graphs sees with this machine's CPU.

bytes:  what is still allocated between forward and backward, the result left out, per token and model channel.
floor:  bytes and FLOPs that the mathematics needs, at this card's measured copy and matrix-product rates.

Gate: on a slice, outputs and all gradients of ours and of the peer agree with the float64 recurrence to 3% (relative
2-norm; bf16 keeps 8 bits), and ours with the peer's at full size to 4%.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import Comparison, GateError, interleave, write_evidence

from eco_llm.runtime import set_cache_dirs

CHUNKS = (64, 128, 256)
NAMES = ("y", "dx", "ddt", "dA", "dB", "dC", "dD")


def ssd_floor(
    batch: int, time: int, heads: int, width: int, state: int, chunk: int, narrow: int = 2
) -> dict[str, float]:
    """Bytes and FLOPs of SSD, forward and forward + backward, each tensor touched once a pass.

    Bytes: x, y and their gradients `narrow` wide, so are B and C (one group); dt and its gradient are fp32. FLOPs:
    those of `SigmaLLM.flops_per_token`; backward is twice forward, states recomputed are not counted.
    """
    tokens, inner = batch * time, heads * width
    forward = tokens * (2 * inner * narrow + 2 * state * narrow + 4 * heads)
    backward = tokens * (3 * inner * narrow + 4 * state * narrow + 8 * heads)
    flops = tokens * (4 * inner * state + min(chunk, time) * (state + inner))
    return {
        "forward_bytes": forward, "forward_backward_bytes": forward + backward,
        "forward_flops": flops, "forward_backward_flops": 3 * flops,
    }  # fmt: skip


def mixer_floor(tokens: int, model: int, inner: int, state: int, heads: int, chunk: int) -> dict[str, float]:
    """FLOPs and bytes of the whole mixer, forward + backward: two projections, convolution, SSD, gate and norm.

    Bytes: input and output, what crosses between products (the in-projection's result, x B C after the convolution, y,
    the gated norm's result), bf16, written and read once forward, read again with its gradient written and read
    backward: 5 accesses of 2 bytes each.
    """
    conv = inner + 2 * state
    wide = inner + conv + heads
    products = 6 * tokens * (model * wide + inner * model)
    flops = products + 3 * tokens * (4 * inner * state + chunk * (state + inner))
    return {"flops": flops, "bytes": 5 * 2 * tokens * (2 * model + wide + conv + 2 * inner)}


def relative_error(a: Any, b: Any) -> float:
    """|a − b| / |b| in float64 2-norms."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def gate(name: str, got: Sequence[Any], expected: Sequence[Any], limit: float) -> dict[str, float]:
    """Relative errors by name.

    Raises:
        GateError: one is above `limit`, or not a number.
    """
    errors = {what: relative_error(a, b) for what, a, b in zip(NAMES, got, expected, strict=True)}
    if bad := {what: f"{e:.3g}" for what, e in errors.items() if not e <= limit}:
        raise GateError(f"{name}: relative errors {bad} are above {limit:g}; no speed is reported")
    return errors


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of mamba")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peer-chunks", type=int, nargs="+", default=CHUNKS, help="each is tuned anew, for a minute")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    arguments = parser.parse_args()
    set_cache_dirs()

    import torch
    import torch.nn.functional as F
    from peers import describe, load_mamba_module
    from steps import clean, measured_rates, replayed, seconds_each
    from torch import Tensor, nn

    from eco_llm.config import RuntimeConfig, SigmaConfig
    from eco_llm.model.mamba import Mamba
    from eco_llm.ops.backend import kernels_for
    from eco_llm.ops.ssd import choose_chunk, ssd
    from eco_llm.runtime import Runtime

    runtime = Runtime.detect(RuntimeConfig(device="cuda"))
    runtime.setup(0)
    device = runtime.device
    peer = load_mamba_module(arguments.peer, "ops.triton.ssd_combined")
    rmsnorm_fn = load_mamba_module(arguments.peer, "ops.triton.layernorm_gated").rmsnorm_fn
    peer_ssd = peer.mamba_chunk_scan_combined
    shape = SigmaConfig()
    batch, length = arguments.batch, arguments.seq_len
    heads, width, state, inner = shape.mamba_n_heads, shape.mamba_head_dim, shape.mamba_state_dim, shape.mamba_inner_dim
    our_chunk = choose_chunk(length)
    tokens = batch * length

    def inputs(batch: int, length: int) -> list[Tensor]:
        """x, dt, A, B, C, D in the ranges of an initialised mixer, and dy."""
        make = functools.partial(torch.randn, device=device)
        dt = torch.exp(torch.empty(batch, length, heads, device=device).uniform_(-6.9, -2.3))
        decay = -torch.empty(heads, device=device).uniform_(1.0, 16.0)
        x, dy = (make(batch, length, heads, width).bfloat16() for _ in range(2))
        b, c = (make(batch, length, 1, state).bfloat16() for _ in range(2))
        return [x, dt, decay, b, c, make(heads), dy]

    def run_ours(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ssd(x, dt, a, b, c, d, chunk_size=our_chunk)

    def run_peer(chunk: int) -> Callable[..., Tensor]:
        return lambda x, dt, a, b, c, d: peer_ssd(x, dt, a, b, c, chunk, D=d)

    def run_recurrent(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ssd(x, dt, a, b, c, d, chunk_size=our_chunk, backend="recurrent")

    def with_gradients(f: Callable[..., Tensor], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = [v.detach().clone().requires_grad_() for v in values[:6]]
        y = f(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, values[6].to(y.dtype)))

    # ---- gate ------------------------------------------------------------------------------------------------
    values = inputs(batch, length)
    small = inputs(1, min(length, 512))
    truth = with_gradients(run_recurrent, [v.double() for v in small])
    errors = {"ours": gate("ours against float64", with_gradients(run_ours, small), truth, 3e-2)}
    full = with_gradients(run_ours, values)
    for chunk in arguments.peer_chunks:
        errors[f"peer_{chunk}"] = gate(f"peer {chunk}", with_gradients(run_peer(chunk), small), truth, 3e-2)
        gate(f"ours against peer {chunk}", full, with_gradients(run_peer(chunk), values), 4e-2)
    del full, truth

    samples: list[dict[str, Any]] = []
    summary: dict[str, Any] = {f"error_{side}_{k}": e for side, es in errors.items() for k, e in es.items()}
    table: list[list[Any]] = []

    def compare(
        name: str, a: Callable[[], object], b: Callable[[], object], count: int = 20, *, replay: bool = True
    ) -> Comparison:
        wait = torch.cuda.synchronize
        if replay:
            a, b = replayed(a), replayed(b)
        result = interleave(seconds_each(a, wait, count), seconds_each(b, wait, count), arguments.rounds, warmup=2)
        nonlocal samples, summary
        samples += [{"pair": name, **s} for s in result.samples()]
        summary |= {f"{name}_{k}": v for k, v in result.summary().items()}
        ms = (1e3 * result.median_a, 1e3 * result.median_b)
        interval = f"{result.ratio_low:.2f} – {result.ratio_high:.2f}"
        table.append([name.replace("_", " "), round(ms[0], 3), round(ms[1], 3), round(result.ratio, 2), interval])
        print(f"{name}: peer {ms[0]:.3f} ms, ours {ms[1]:.3f} ms, ratio {result.ratio:.2f} ({interval})", flush=True)
        return result

    # ---- (a) SSD alone ---------------------------------------------------------------------------------------
    def forward(f: Callable[..., Tensor]) -> Callable[[], object]:
        def work() -> object:
            with torch.no_grad():
                return f(*values[:6])

        return work

    def both(f: Callable[..., Tensor]) -> Callable[[], object]:
        leaves = [v.detach().clone().requires_grad_() for v in values[:6]]
        return lambda: torch.autograd.grad(f(*leaves), leaves, values[6])

    fastest = (float("inf"), 0)
    for chunk in arguments.peer_chunks:
        compare(f"ssd_forward_peer{chunk}", forward(run_peer(chunk)), forward(run_ours))
        result = compare(f"ssd_forward_backward_peer{chunk}", both(run_peer(chunk)), both(run_ours))
        fastest = min(fastest, (result.median_a, chunk))
    peer_chunk = fastest[1]
    clean(device)

    # ---- (b) the whole mixer ---------------------------------------------------------------------------------
    class PeerMixer(Mamba):
        """Our parameters through the peer's pieces, in the order of its own mixer."""

        def forward(self, u: Tensor, keep: object = None) -> Tensor:
            z, xbc, dt = self.in_proj(u).split((self.inner_dim, self.conv_dim, self.n_heads), dim=-1)
            xbc = F.silu(self.conv1d(F.pad(xbc, (0, 0, self.conv_width - 1, 0)).transpose(1, 2))).transpose(1, 2)
            x, b, c = xbc.split((self.inner_dim, self.state_dim, self.state_dim), dim=-1)
            y = peer_ssd(
                x.unflatten(-1, (self.n_heads, self.head_width)), dt, -torch.exp(self.A_log), b.unsqueeze(2),
                c.unsqueeze(2), peer_chunk, D=self.D, dt_bias=self.dt_bias, dt_softplus=True,
            )  # fmt: skip
            y = rmsnorm_fn(y.flatten(2), self.norm.weight, None, z=z, eps=self.norm.eps, norm_before_gate=False)
            return self.out_proj(y)

    class Attention(nn.Module):
        """Plain causal attention of the same width: the yardstick, not an equal."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(shape.d_model, 3 * shape.d_model, bias=False)
            self.out = nn.Linear(shape.d_model, shape.d_model, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, shape.n_heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2))

    with torch.device(device):
        ours, compiled, theirs, attention = Mamba(shape), Mamba(shape), PeerMixer(shape), Attention()
    compiled.load_state_dict(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    compiled.compile(dynamic=False)
    u = torch.randn(batch, length, shape.d_model, device=device).bfloat16().requires_grad_()
    dy = torch.randn_like(u)

    def apply(mixer: nn.Module) -> Tensor:
        with runtime.autocast():
            y: Tensor = mixer(u)
        return y

    def train(mixer: nn.Module) -> Callable[[], object]:
        parameters = [u, *mixer.parameters()]
        return lambda: torch.autograd.grad(apply(mixer), parameters, dy)

    reference = apply(theirs)
    for name, candidate in (("ours eager", ours), ("ours compiled", compiled)):
        if not (error := relative_error(apply(candidate), reference)) <= 3e-2:
            raise GateError(f"mixer, {name}: differs from the peer's by {error:.3g}; no speed is reported")
        summary[f"error_mixer_{name.replace(' ', '_')}"] = error
    del reference
    compare("mixer", train(theirs), train(compiled), 5)
    compare("attention_against_mixer", train(attention), train(compiled), 5)
    compare("mixer_launched", train(theirs), train(ours), 5, replay=False)

    # ---- (c) bytes kept ----------------------------------------------------------------------------------------
    def bytes_kept(mixer: nn.Module) -> float:
        train(mixer)()
        clean(device)
        before = torch.cuda.memory_allocated(device)
        y = apply(mixer)
        kept = torch.cuda.memory_allocated(device) - before - y.numel() * y.element_size()
        torch.autograd.grad(y, [u], dy)
        return kept / (tokens * shape.d_model)

    sides: dict[str, nn.Module] = {
        "ours_eager": ours,
        "ours_compiled": compiled,
        "peer": theirs,
        "attention": attention,
    }
    for name, side in sides.items():
        summary[f"bytes_kept_{name}"] = bytes_kept(side)
        print(f"bytes kept per token and channel, {name}: {summary[f'bytes_kept_{name}']:.1f}")

    # ---- (d) floor ---------------------------------------------------------------------------------------------
    rates = measured_rates(device)
    summary |= rates
    floor = ssd_floor(batch, length, heads, width, state, our_chunk)
    whole = mixer_floor(tokens, shape.d_model, inner, state, heads, our_chunk)
    for what, by, fl in (
        ("ssd_forward", floor["forward_bytes"], floor["forward_flops"]),
        ("ssd_forward_backward", floor["forward_backward_bytes"], floor["forward_backward_flops"]),
        ("mixer", whole["bytes"], whole["flops"]),
    ):
        summary[f"floor_{what}_bytes_ms"] = 1e3 * by / rates["copy_bytes_per_s"]
        summary[f"floor_{what}_flops_ms"] = 1e3 * fl / rates["matmul_flops_per_s"]
        print(f"floor, {what}: {summary[f'floor_{what}_bytes_ms']:.3f} ms of bytes,"
              f" {summary[f'floor_{what}_flops_ms']:.3f} ms of FLOPs")  # fmt: skip
    payload = {
        "what": "SSD and Mamba mixer; A mamba_ssm, B ours", "unit": "s", "dtype": "bfloat16", "peer_chunk": peer_chunk,
        "shape": [batch, length, heads, width, state], "our_chunk": our_chunk, "backend": kernels_for(device).name,
        "peer": describe(arguments.peer, ["mamba_ssm/ops/triton/ssd_combined.py"]),
        "table": {"header": ["work", "peer, ms", "ours, ms", "peer / ours", "95% interval"], "rows": table},
        "summary": summary, "samples": samples,
    }  # fmt: skip
    print(write_evidence("mamba_mixer", payload, device=str(device)))


if __name__ == "__main__":
    main()
