"""Claims: the step as one CUDA graph against the same step launched piece by piece; what timing phases inside costs.

    python benchmarks/graph_step.py [--rounds N] [ARGUMENTS OF eco_train train …]

Copies of one training (model, C3O, data order), advanced in turn, ten steps a sample: `eager`; `graph`, with the phase
timer and its event nodes; `untimed`, the same graph without them. Writes `graph_step_BxT` (A eager, B graph) and
`graph_phases_BxT` (A graph, B untimed: the ratio is the cost of the phases, at most 1.01 wanted).

Gate: the same losses, bit for bit, over GATE_STEPS steps taken in turn, with PyTorch's deterministic algorithms.
Without them SDPA's backward adds in an order that varies, and no two runs agree, eager or not: that spread, of two
eager copies, is in the evidence beside that of eager and graph. Speed is measured without them, as users run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from common import NoTimer, interleave, require_close, seconds_of, write_evidence

from eco_llm.cli.args_file import expand
from eco_llm.cli.parse import parse
from eco_llm.config import TrainConfig
from eco_llm.runtime import Runtime, set_cache_dirs

DEFAULT = ["@train_sigma_args.txt", "--torch-compile"]
STEPS = 10
GATE_STEPS = 120


def main(argv: list[str]) -> None:
    """Measure, print, write the evidence."""
    rounds = 15
    if argv[:1] == ["--rounds"]:
        rounds, argv = int(argv[1]), argv[2:]
    config = parse(TrainConfig, expand(argv or DEFAULT), prog="graph_step")
    set_cache_dirs()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS

    import torch
    from steps import clean

    from eco_llm.data.loader import Batch
    from eco_llm.model.sigma_llm import SigmaLLM
    from eco_llm.optim.factory import build_optimizer
    from eco_llm.optim.update import Update
    from eco_llm.perf.phases import PhaseTimer
    from eco_llm.training.graph import GraphedStep
    from eco_llm.training.step import Step, TrainStep

    runtime = Runtime.detect(config.runtime)
    t = config.training
    runtime.setup(t.seed)
    drawn = torch.randint(config.model.vocab_size, (8, 2, t.batch_size, t.seq_len)).pin_memory()

    def source() -> Iterator[Batch]:
        while True:
            for both in drawn:
                yield Batch(both[0], both[1])

    losses: dict[str, list[Any]] = {}

    def side(name: str, timer: Any, *, graph: bool) -> Callable[..., None]:
        torch.manual_seed(t.seed)
        with torch.device(runtime.device):
            model = SigmaLLM(config.model)
        if runtime.compile:
            model.compile_blocks()
        groups = model.parameter_groups(config.optimizer.weight_decay)
        update = Update(build_optimizer(groups, config.optimizer, config.c3o, runtime.device), config.optimizer)
        batches: Any = source()
        step: Step = TrainStep(model, update, batches, runtime, timer, t.grad_accum)
        if graph:
            step = GraphedStep(step, (t.batch_size, t.seq_len), fall_back=None)  # type: ignore[arg-type]
        timed = isinstance(timer, PhaseTimer)
        losses[name] = []

        def advance(steps: int = STEPS) -> None:
            for _ in range(steps):
                if timed:
                    timer.begin_step()
                step.prepare()
                update.set_lr(config.optimizer.lr)
                output = step.run()
                losses[name].append(output.values[0].clone())
                if timed:
                    timer.mark_core_end()
                    timer.end_step()
                    timer.collect()

        return advance

    def values(name: str) -> list[float]:
        return [float(x) for x in losses[name]]

    def build() -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
        return (
            side("eager", PhaseTimer(runtime.device), graph=False),
            side("graph", PhaseTimer(runtime.device), graph=True),
            side("untimed", NoTimer(), graph=True),
        )

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    together = build()
    for _ in range(GATE_STEPS // STEPS):
        for advance in together:
            advance()
    del together
    for name in ("graph", "untimed"):
        for expected, loss in zip(values("eager"), values(name), strict=True):
            require_close(expected, loss, relative=0.0, what=f"loss of eager and {name}")
    print(f"gate: {GATE_STEPS} losses of eager and graph are equal, the last {values('graph')[-1]:.6f}", flush=True)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    clean(runtime.device)

    eager, graph, untimed = build()
    again = side("again", PhaseTimer(runtime.device), graph=False)
    wait = torch.cuda.synchronize
    first = interleave(seconds_of(eager, wait), seconds_of(graph, wait), rounds, warmup=2)
    second = interleave(seconds_of(graph, wait), seconds_of(untimed, wait), rounds, warmup=2)
    again(len(losses["eager"]))
    reference = values("eager")
    apart = {
        name: [abs(a - b) / a for a, b in zip(reference, values(name), strict=False)] for name in ("again", "graph")
    }
    spread = {name: max(differences) for name, differences in apart.items()}
    # Where a difference of the last bit first appears is chance; how far it grows from there is the training's.
    first_apart = {name: next((i for i, d in enumerate(ds) if d), len(ds)) for name, ds in apart.items()}
    for step in range(0, len(reference), 20):
        print(step, *(f"{name} {values(name)[step]:.6f}" for name in ("eager", "again", "graph")))
    print(f"largest relative difference of losses over {len(reference)} steps: two eager copies {spread['again']:.2g},"
          f" eager and graph {spread['graph']:.2g}; first apart at step {first_apart}")  # fmt: skip
    extra = {
        "gate_steps": GATE_STEPS, "compared_steps": len(reference),
        "first_apart_of_two_eager": first_apart["again"], "first_apart_of_eager_and_graph": first_apart["graph"],
        "loss_spread_of_two_eager": spread["again"], "loss_spread_of_eager_and_graph": spread["graph"],
    }  # fmt: skip
    curves = {name: values(name)[: len(reference)] for name in ("eager", "again", "graph")}
    common: dict[str, Any] = {"losses": curves, "unit": "s", "steps_per_sample": STEPS, "flags": argv or DEFAULT}
    shape = f"{t.batch_size}x{t.seq_len}"
    for claim, a, b, result in (
        ("graph_step", "eager", "graph", first),
        ("graph_phases", "graph with timed phases", "graph without", second),
    ):
        print(
            f"{a} {1000 * result.median_a / STEPS:.3f} ms, {b} {1000 * result.median_b / STEPS:.3f} ms:"
            f" {result.ratio:.4f} ({result.ratio_low:.4f} – {result.ratio_high:.4f})"
        )
        payload = {**common, "a": a, "b": b, "summary": result.summary() | extra, "samples": result.samples()}
        print(write_evidence(f"{claim}_{shape}", payload, device=str(runtime.device)))


if __name__ == "__main__":
    main(sys.argv[1:])
