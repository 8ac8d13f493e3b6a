"""Claim: what the approximate memory modes cost in time, and what they do to a gradient.

    python benchmarks/gradient_error.py [--train-steps 200] [--rounds 8] [--shape 32x1024]

A SigmaLLM of the default profile is trained on real text (bytes) with everything kept; its weights are then used by
every side. Per side: the relative error, in norm, of all gradients as one vector on one batch against the exact ones;
the step's time paired with that of `none`; what is kept, in bytes against bf16; for fixed-point the iterations, the
largest residual and the error of reconstructed rows. Gate: the forward loss is that of `none` within 1e-3
(halves of blocks, compiled on their own, are fused differently; recorded as `loss_difference`).
"""

from __future__ import annotations

import argparse
from typing import Any

from common import GateError, interleave, require_close, seconds_of, write_evidence

from eco_llm.runtime import set_cache_dirs

SIDES = {
    "recompute": {"instant_mode": "recompute"},
    "compress, 8 bits": {"instant_mode": "compress", "instant_bits": "8"},
    "compress, 4 bits": {"instant_mode": "compress", "instant_bits": "4"},
    "fixed-point, 2e-3": {"instant_mode": "fixed-point", "instant_reversible_tol": 2e-3},
    "fixed-point, 3e-3": {"instant_mode": "fixed-point", "instant_reversible_tol": 3e-3},
}


def main() -> None:
    """Measure, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shape", default="32x1024")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    batch, length = (int(n) for n in arguments.shape.split("x"))
    set_cache_dirs()

    import torch
    from steps import Ours, Text, clean

    from eco_llm.config import InstantConfig, OptimizerConfig, RuntimeConfig, SigmaConfig
    from eco_llm.instant.verification import BLOCK_PREFIX
    from eco_llm.runtime import Runtime

    runtime = Runtime.detect(RuntimeConfig(device=arguments.device))
    device, shape = runtime.device, SigmaConfig()
    text = Text(batch, length, device)
    trained = Ours(shape, text.cycle(), runtime, settings=OptimizerConfig(lr=6e-4))
    losses = [float(trained.step()) for _ in range(3)]
    for _ in range(arguments.train_steps):
        last = trained.step()
    losses.append(float(last))
    weights = {k: v.clone() for k, v in trained.model.state_dict().items()}
    print(f"trained: {losses}", flush=True)
    if not losses[-1] < losses[0] - 2:
        raise GateError(f"not trained: {losses}")
    del trained, last
    held_out = text.to_device(text.cycle())

    def gradients(side: Ours) -> tuple[float, dict[str, torch.Tensor]]:
        stack = side.model.stack
        stack.prepare(device)
        stack.begin_step()
        with runtime.autocast():
            loss = side.model.loss(held_out.inputs, held_out.targets)
        loss.backward()
        found = {n: p.grad.double() for n, p in side.model.named_parameters() if p.grad is not None}
        side.model.zero_grad(set_to_none=True)
        return float(loss.detach()), found

    def make(instant: InstantConfig | None) -> Ours:
        side = Ours(shape, text.cycle(), runtime, graph=False, instant=instant, settings=OptimizerConfig(lr=0.0))
        side.model.load_state_dict(weights)
        side.step()
        side.model.load_state_dict(weights)
        return side

    plain = make(None)
    exact_loss, exact = gradients(plain)
    again_loss, again = gradients(plain)
    norm = torch.stack([g.square().sum() for g in exact.values()]).sum().sqrt()

    def error(found: dict[str, torch.Tensor]) -> float:
        return float(torch.stack([(found[n] - g).square().sum() for n, g in exact.items()]).sum().sqrt() / norm)

    rows, samples = [["none, run again", "1.000", f"{error(again):.1e}", "", "", ""]], []
    summary: dict[str, Any] = {"trained_losses": losses, "repeat_error": error(again), "exact_loss": exact_loss}
    if again_loss != exact_loss:
        raise GateError(f"the loss of one batch is {exact_loss!r}, then {again_loss!r}")
    for name, settings in SIDES.items():
        clean(device)
        side = make(InstantConfig(**settings))  # type: ignore[arg-type]
        if "fixed-point" in name:
            side.step()
            torch.cuda.synchronize()
            print(side.review(200), flush=True)
        loss, found = gradients(side)
        require_close(exact_loss, loss, relative=1e-3, what=f"loss of none and {name}")
        wrong = error(found)
        del found
        names, values = side.model.stack.metrics_tensor()
        verdicts = dict(zip(names, values.tolist(), strict=True)) if values is not None else {}
        result = interleave(
            seconds_of(side.step, torch.cuda.synchronize),
            seconds_of(plain.step, torch.cuda.synchronize),
            arguments.rounds,
        )
        figures = side.model.stack.figures()
        kept = {k: v for k, v in verdicts.items() if not k.startswith(BLOCK_PREFIX)}
        summary[name] = {
            "gradient_error": wrong,
            "loss_difference": loss - exact_loss,
            **result.summary(),
            **figures,
            **kept,
        }
        print(name, summary[name], flush=True)
        samples += [{"side": name, **s} for s in result.samples()]
        rows.append([
            name, f"{result.ratio:.3f}", f"{wrong:.1e}",
            f"{figures['instant_compression_ratio']:.2f}" if "instant_compression_ratio" in figures else "",
            f"{figures['instant_inversion_iters']:.2f} ({figures['instant_inverted_blocks']:.0f} blocks)"
            if "instant_inversion_iters" in figures else "",
            f"{verdicts['instant_inversion_rel_residual']:.1e} / {verdicts['instant_reconstruction_error']:.1e}"
            if verdicts else "",
        ])  # fmt: skip
        del side
    payload = {
        "what": "step; A the mode, B none", "unit": "s", "shape": arguments.shape, "dtype": str(runtime.compute_dtype),
        "table": {
            "title": f"gradient error and time, {arguments.shape}",
            "header": ["mode", "time / none", "gradient error", "bytes, bf16 / kept", "iterations", "residual / rows"],
            "rows": rows,
        },
        "summary": summary, "samples": samples,
    }  # fmt: skip
    print(write_evidence("gradient_error", payload, device=str(device)))


if __name__ == "__main__":
    main()
