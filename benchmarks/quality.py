"""Claim: what C3O, INSTANT and the storages of C3O's state do to the loss on real text, at the end of the decay.

    python benchmarks/quality.py --runs runs/quality --workers 2 [--stages search,finals] [--deadline 500]
    python benchmarks/quality.py --collect runs/quality/runs.jsonl

A SigmaLLM of 34M parameters learns the sources of the installed packages (`--data python-env`), every run by the
product's own loop with its own warm-up and cosine to the end, and is judged by its loss on held-out text. Stages:

    search   C3O, AdamW, Muon: learning rate × weight decay, and C3O on a sphere: learning rate × sphere; seed 0, on
             beyond the edges of the grid
    finals   each at its best point, seeds 1 and 2; both C3Os also with 0.87 of the tokens (the bar: AdamW's loss
             with these)
    ablate   C3O with one change at a time
    instant  C3O under each memory mode
    storage  C3O's state and weights in fewer bits, 1,000 steps

A run's line is on the disk when the run has ended; the same command goes on where it was stopped, and processes share
the work through locks (quality_queue.py). `--collect` writes the evidence and needs no GPU: lines tell the hardware.
Further flags are those of `eco_train train`; they are the same for all runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from quality_plan import INSTANT, OPTIMIZERS, STAGES, Item, Results, Spec, Study, plan
from quality_queue import Queue
from quality_tables import collect

from eco_llm.cli.parse import parse
from eco_llm.config import C3OConfig, TrainConfig
from eco_llm.data.prepare import prepare
from eco_llm.data.shards import PreparedData
from eco_llm.errors import UserError
from eco_llm.perf import environment
from eco_llm.runtime import Runtime, set_cache_dirs

if TYPE_CHECKING:
    from quality_train import Trainer

PACKAGE = Path(__file__).resolve().parents[1] / "eco_llm"
PRESETS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "h200": (
        ["--d-model", "512", "--n-layers", "8", "--n-heads", "8", "--vocab-size", "8192", "--batch-size", "64",
         "--seq-len", "512", "--data", "python-env", "--val-fraction", "0.02", "--eval-batches", "33"],
        {},
    ),
    "tiny": (
        ["--d-model", "32", "--n-layers", "2", "--n-heads", "2", "--mamba-ratio", "1", "--attention-ratio", "1",
         "--mamba-head-dim", "16", "--mamba-state-dim", "16", "--kv-latent-dim", "16", "--rope-head-dim", "8",
         "--vocab-size", "320", "--batch-size", "4", "--seq-len", "32", "--data", str(PACKAGE), "--val-fraction",
         "0.05", "--eval-batches", "8", "--device", "cpu", "--no-torch-compile"],
        {"search_tokens": 1280, "final_tokens": 2560, "ablate_tokens": 1280, "storage_steps": 10,
         "learning_rates": (2e-3, 8e-3), "weight_decays": (0.1,), "sphere_learning_rates": (8e-3,),
         "spheres": (1.0, 2.0), "extensions": 1},
    ),
}  # fmt: skip
CPU_RATE, CUDA_RATE = 2e4, 4e5  # tokens/s assumed of a kind of run that none has measured
CUDA_SETUP_S, CUDA_COMPILE_S = 8.0, 40.0  # assumed before anything is known
MARGIN = 1.1


def main(argv: Sequence[str] | None = None) -> int:
    """Launch, work or collect. Exit codes: 0 done (all or up to the deadline), 1 a worker failed, 2 a bad flag."""
    arguments, flags = _parser().parse_known_args(argv)
    try:
        if arguments.collect is not None:
            for path in collect(arguments.collect):
                print(path)
            return 0
        preset, settings = PRESETS[arguments.preset]
        config = parse(TrainConfig, [*preset, "--data-cache", arguments.data_cache, *flags], prog="quality")
        study = study_of(arguments, [*preset, *flags], config, settings)
    except UserError as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    set_cache_dirs()
    end = time.time() + arguments.deadline if arguments.deadline else float("inf")
    if arguments.prepare:
        data, seconds = prepared(config)
        print(f"prepared in {seconds:.1f} s: {data.manifest.splits['train'].tokens:,} training tokens", flush=True)
        return 0
    if arguments.workers > 1:
        return launch(arguments, list(sys.argv[1:] if argv is None else argv), end)
    try:
        work(study, config, Queue(arguments.runs, arguments.locks), arguments.worker, end)
    except UserError as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    return 0


def study_of(
    arguments: argparse.Namespace, flags: Sequence[str], config: TrainConfig, settings: dict[str, Any]
) -> Study:
    """What the command line asks for; the preset's settings where it is silent.

    Raises:
        UserError: an unknown stage, optimizer or mode, or a number that is none.
    """

    def chosen(name: str, text: str | None, known: Sequence[str], by: str = ",") -> tuple[str, ...]:
        if text is None:
            return tuple(known)
        picked = tuple(part.strip() for part in text.split(by))
        if unknown := [p for p in picked if p not in known]:
            raise UserError(f"--{name}: {unknown[0]!r} is not one of {f'{by} '.join(known)}")
        return picked

    given: dict[str, Any] = {}
    try:
        for name in ("learning_rates", "weight_decays", "sphere_learning_rates", "spheres"):
            if (text := getattr(arguments, name)) is not None:
                given[name] = tuple(float(part) for part in text.split(","))
        if arguments.seeds is not None:
            given["seeds"] = tuple(int(part) for part in arguments.seeds.split(","))
        best = {}
        for text in arguments.best:
            optimizer, _, pair = text.partition("=")
            lr, _, decay = pair.partition(":")
            chosen("best", optimizer, OPTIMIZERS)
            best[optimizer] = (float(lr), float(decay))
        given["c3o"] = tuple(_c3o_setting(text) for text in arguments.c3o)
    except ValueError as error:
        raise UserError(f"quality: {error}") from None
    numbers = ("search_tokens", "final_tokens", "ablate_tokens", "storage_steps", "extensions")
    given |= {name: value for name in numbers if (value := getattr(arguments, name)) is not None}
    if any(given.get(name, 1) < 1 for name in numbers[:-1]):
        raise UserError("quality: token and step counts must be positive")
    study = Study(
        flags=tuple(_portable(flag) for flag in flags),
        tokens_per_step=config.training.tokens_per_step,
        stages=tuple(s for s in STAGES if s in chosen("stages", arguments.stages, STAGES)),
        optimizers=chosen("optimizers", arguments.optimizers, OPTIMIZERS),
        instant=chosen("instant-modes", arguments.instant_modes, tuple(INSTANT), by=";"),
        best=best,
        **(settings | given),
    )
    if max(study.sphere_learning_rates) * max(study.spheres) >= 1:
        raise UserError("--spheres: learning rate × sphere is a share of a matrix's norm; it must be under 1")
    return study


def _c3o_setting(text: str) -> tuple[str, Any]:
    """`trust_radius=0` as a field of C3OConfig and its value, of the field's type.

    Raises:
        UserError: there is no such field, or a switch is not True or False.
    """
    name, _, value = text.partition("=")
    known: dict[str, Any] = {f.removeprefix("c3o_"): v for f, v in dataclasses.asdict(C3OConfig()).items()}
    if name not in known:
        raise UserError(f"--c3o {text!r}: {name!r} is not one of {', '.join(known)}")
    if isinstance(known[name], bool):
        if value not in ("True", "False"):
            raise UserError(f"--c3o {text!r}: {name} is True or False")
        return f"c3o_{name}", value == "True"
    return f"c3o_{name}", type(known[name])(value)


def _portable(flag: str) -> str:
    return "eco_llm" if flag == str(PACKAGE) else flag


def launch(arguments: argparse.Namespace, argv: list[str], end: float) -> int:
    """Workers in processes of their own, one a GPU; meanwhile one more prepares the data, while they compile."""
    here, started = [sys.executable, str(Path(__file__).resolve())], time.time()
    kept = [*argv, "--workers", "1"]  # the last one counts
    preparing = subprocess.Popen([*here, *kept, "--prepare"])
    workers = []
    for index in range(arguments.workers):
        own = [*kept, "--worker", str(index)]
        if arguments.deadline:
            own += ["--deadline", str(max(1.0, end - started))]
        variables = dict(os.environ)
        if arguments.preset != "tiny":
            visible = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
            variables["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) and visible[0] else str(index)
        workers.append(subprocess.Popen([*here, *own], env=variables))
    try:
        codes = [process.wait() for process in (preparing, *workers)]  # all, also after a failure
        return int(any(codes))
    finally:
        for process in (preparing, *workers):
            if process.poll() is None:
                process.terminate()


def prepared(config: TrainConfig) -> tuple[PreparedData, float]:
    """The tokens, made by one process while the others wait, and the seconds this took here."""
    started = time.perf_counter()
    cache = Path(config.data.data_cache)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".quality.lock"):
        data = prepare(config.data, config.model.vocab_size)
    return data, time.perf_counter() - started


def work(study: Study, config: TrainConfig, queue: Queue, worker: int, end: float) -> None:
    """Do runs until none is left, those of other processes included, or none would end in time.

    Raises:
        UserError: the results so far are of other data, with which new ones could not be compared.
    """
    begun = time.time()
    from quality_train import StoppedError, Trainer

    runtime = Runtime.detect(config.runtime)
    trainer = Trainer(config, runtime)
    base = " ".join(study.flags)
    trainer.warm_up(Spec(base, "c3o", 1e-3, 0.1, 10, 0))
    warm_s = time.time() - begun
    data, prepare_s = prepared(config)
    mine = data.manifest.fingerprint()
    if any(line["kind"] == "start" and line["data_fingerprint"] != mine for line in queue.lines()):
        raise UserError(f"{queue.file} has runs on other data (another machine's packages?); use another --runs")
    queue.append(_start_line(study, config, trainer, data, worker, {"warm_up_s": warm_s, "prepare_s": prepare_s}))
    print(f"worker {worker}: ready after {time.time() - begun:.1f} s (compiled in {warm_s:.1f} s)", flush=True)

    def attempt(item: Item) -> bool:
        """Whether the process may go on."""
        record = trainer.run(item.spec, data)
        line = {"kind": "run", "key": item.spec.key, "stage": item.stage, "label": item.label, "worker": worker}
        queue.append(line | {"spec": dataclasses.asdict(item.spec)} | record)
        _say(item, record)
        return record["status"] != "crashed" or _device_lives(runtime)

    def needs(item: Item, results: Results) -> float:
        return seconds_needed(item.spec, results, trainer, study)

    try:
        pull(study, queue, end, attempt, needs, trainer.has, worker)
    except StoppedError:
        print(f"worker {worker}: stopped by a signal; the run in flight is lost", flush=True)


def pull(
    study: Study,
    queue: Queue,
    end: float,
    attempt: Callable[[Item], bool],
    needs: Callable[[Item, Results], float],
    compiled: Callable[[Spec], bool],
    worker: int = 0,
) -> None:
    """Claim and attempt items until there are none, while others' runs may still bring new ones.

    The most important comes first; within a stage, one whose model this process has compiled, then kinds of model in an
    order that each worker begins elsewhere, lest all compile the same. It cannot wait for ever: it waits only while
    another process holds a claim, and a dead one holds none.
    """
    tried: set[str] = set()
    rank = {stage: i for i, stage in enumerate(study.stages)}
    while True:
        results = queue.results()
        items, waiting = plan(study, results)
        first: dict[str, Item] = {}
        for item in items:
            first.setdefault(item.spec.key, item)
        pending = [item for key, item in first.items() if key not in results and key not in tried]
        late, busy = [], False
        turn = _turns(pending, compiled, worker)
        for item in sorted(pending, key=lambda i: (rank[i.stage], turn[i.spec.variant])):
            if time.time() + needs(item, results) > end:
                late.append(item)
                continue
            claim = queue.claim(item.spec.key)
            if claim is None:
                busy = True
                continue
            tried.add(item.spec.key)
            try:
                lives = attempt(item)
            finally:
                claim.release()
            if not lives:
                raise SystemExit(1)
            break
        else:
            if not busy or time.time() > end:
                for text in waiting:
                    print(f"not planned: {text}", flush=True)
                for item in late:
                    print(f"not begun, too late: {item.stage}, {item.label}, seed {item.spec.seed}", flush=True)
                return
            time.sleep(0.2)


def _turns(items: list[Item], compiled: Callable[[Spec], bool], worker: int) -> dict[tuple[Any, ...], int]:
    """Rank of each kind of model among `items`."""
    new = list(dict.fromkeys(item.spec.variant for item in items if not compiled(item.spec)))
    turn = dict.fromkeys((item.spec.variant for item in items), 0)
    return turn | {variant: 1 + (i - worker) % len(new) for i, variant in enumerate(new)}


def seconds_needed(spec: Spec, results: Results, trainer: Trainer, study: Study) -> float:
    """What a run will take, from earlier runs of its kind, else from all, else assumed."""
    done = [r for r in results.values() if r["status"] == "done" and r.get("tokens_per_s")]
    on_cuda = trainer.runtime.device.type == "cuda"

    same = [r["tokens_per_s"] for r in done if Spec(**_tuples(r["spec"])).kind == spec.kind]
    every = [r["tokens_per_s"] for r in done if r["spec"]["optimizer"] == spec.optimizer]
    rate = min(same) if same else 0.5 * min(every, default=2 * (CUDA_RATE if on_cuda else CPU_RATE))
    # Capture, validation and whatever else is not a step; where nothing was compiled, which is told apart.
    setups = [r["wall_s"] - r["tokens"] / r["tokens_per_s"] for r in done if r.get("graphs_compiled") == 0]
    setup = statistics.median(setups) if setups else (CUDA_SETUP_S if on_cuda else 0.1)
    if on_cuda and not trainer.has(spec):
        setup += CUDA_COMPILE_S
    return MARGIN * (spec.steps * study.tokens_per_step / rate + setup)


def _tuples(raw: dict[str, Any]) -> dict[str, Any]:
    """A Spec's fields as they were before JSON."""
    return {k: tuple(tuple(pair) for pair in v) if isinstance(v, list) else v for k, v in raw.items()}


def _device_lives(runtime: Runtime) -> bool:
    """Whether the device answers; after an illegal access no later run could be trusted."""
    import torch

    if runtime.device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(runtime.device)
        return bool((torch.ones(2, device=runtime.device).sum() == 2).item())
    except Exception:
        return False


def _start_line(
    study: Study, config: TrainConfig, trainer: Trainer, data: PreparedData, worker: int, times: dict[str, float]
) -> dict[str, Any]:
    import torch

    device = trainer.runtime.device
    if device.type == "cuda":
        torch.cuda.init()  # lets the environment block name this GPU
    model = trainer.model(Spec(" ".join(study.flags), "c3o", 1e-3, 0.1, 10, 0))
    splits = data.manifest.splits
    return {
        "kind": "start",
        "worker": worker,
        "study": dataclasses.asdict(study),
        "environment": environment.collect(str(device)),
        "parameters": model.num_parameters(),
        "parameters_without_embedding": model.num_parameters(embedding=False),
        "flops_per_token": model.flops_per_token(config.training.seq_len),
        "training_tokens": splits["train"].tokens,
        "held_out_tokens": splits["val"].tokens,
        "bytes_per_token": splits["val"].bytes_per_token,
        "data_fingerprint": data.manifest.fingerprint(),
        **times,
    }


def _say(item: Item, record: dict[str, Any]) -> None:
    spec = item.spec
    loss = f"{record['final_loss']:.4f}" if record["status"] == "done" else f"{record['status']} ({record['why']})"
    rate = f"{record['tokens_per_s']:,.0f} tok/s" if record["tokens_per_s"] else "no step"
    print(
        f"{item.stage:8} {item.label:24} lr {spec.lr:g} wd {spec.weight_decay:g} seed {spec.seed}"
        f" {spec.steps} steps: {loss}; {rate}, {record['setup_s'] or 0:.1f} s before, {record['wall_s']:.1f} s in all",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of runs.jsonl")
    parser.add_argument("--locks", type=Path, help="folder of the claims, if not below that one")
    parser.add_argument("--collect", type=Path, metavar="RUNS.JSONL", help="write the evidence of these runs and end")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="h200")
    parser.add_argument("--data-cache", default=".data_cache", help="folder of prepared tokens")
    parser.add_argument("--prepare", action="store_true", help="prepare the tokens and end")
    parser.add_argument("--workers", type=int, default=1, help="processes, one a GPU")
    parser.add_argument("--worker", type=int, default=0, help="this process's number, for the records")
    parser.add_argument("--deadline", type=float, help="seconds from now by which every run must have ended")
    parser.add_argument("--stages", help=f"of {','.join(STAGES)}")
    parser.add_argument("--optimizers", help=f"of {','.join(OPTIMIZERS)}")
    parser.add_argument("--instant-modes", help=f"of {'; '.join(INSTANT)}: separated by semicolons")
    parser.add_argument("--search-tokens", type=int)
    parser.add_argument("--final-tokens", type=int)
    parser.add_argument("--ablate-tokens", type=int)
    parser.add_argument("--storage-steps", type=int)
    parser.add_argument("--extensions", type=int, help="most points a search adds beyond its grid")
    parser.add_argument("--seeds", help="of all stages but the search")
    parser.add_argument("--learning-rates", help="the search's grid")
    parser.add_argument("--weight-decays", help="the search's grid")
    parser.add_argument("--sphere-learning-rates", help="the grid of C3O on a sphere")
    parser.add_argument("--spheres", help="the grid of C3O on a sphere; learning rate × sphere < 1")
    parser.add_argument(
        "--c3o",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of every C3O: trust_radius=0; Nesterov is off unless it says nesterov=True",
    )
    parser.add_argument("--best", action="append", default=[], metavar="OPTIMIZER=LR:WD",
                        help="instead of a search; 'c3o sphere=LR:SPHERE'")  # fmt: skip
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
