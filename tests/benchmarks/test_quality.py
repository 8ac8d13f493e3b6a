"""The study of quality: what is planned, who runs it, what survives, what the tables say."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("quality", "quality_plan", "quality_queue", "quality_tables", "quality_train", "common", "steps")


@pytest.fixture
def modules(script: Callable[[str], Any]) -> Any:
    """The study's scripts, `quality_` left out of their names."""
    return SimpleNamespace(**{name.removeprefix("quality_"): script(name) for name in MODULES})


def study(modules: Any, **settings: Any) -> Any:
    given: dict[str, Any] = {"flags": ("--d-model", "8"), "tokens_per_step": 100, "stages": modules.plan.STAGES}
    return modules.plan.Study(**(given | {"search_tokens": 1000, "final_tokens": 10_000} | settings))


def ended(loss: float | None, status: str = "done") -> dict[str, Any]:
    return {"kind": "run", "status": status, "final_loss": loss, "tokens_per_s": 1.0, "skipped_steps": 0, "commit": "c"}


# ---- the plan ----------------------------------------------------------------------------------------------


def test_a_search_goes_on_beyond_the_edge_and_never_takes_a_run_that_diverged(modules: Any) -> None:
    asked = study(modules, learning_rates=(1.0, 2.0, 4.0), weight_decays=(0.1,), extensions=2)
    results: dict[str, Any] = {}
    tried = []
    while not (search := modules.plan.search_of(asked, "adamw", results)).complete:
        for point in search.points:
            if point.key not in results:
                tried.append(point.lr)
                diverged = point.lr >= 8.0
                results[point.key] = ended(None, "diverged") if diverged else ended(10 - point.lr)
    assert tried == [1.0, 2.0, 4.0, 8.0]  # beyond 4, which was best; 8 diverged, and the optimum is inside
    assert search.best is not None
    assert search.best.lr == 4.0
    assert not search.at_edge

    falling = {p: ended(p_loss) for p, p_loss in _losses(modules, asked, lambda lr: -lr)}
    search = modules.plan.search_of(asked, "adamw", falling)
    assert [p.lr for p in search.points] == [1.0, 2.0, 4.0, 8.0, 16.0]  # no further than it may
    assert search.at_edge


def test_weight_decay_is_searched_beyond_both_its_edges_too(modules: Any) -> None:
    asked = study(modules, learning_rates=(1.0, 2.0, 4.0), weight_decays=(0.05, 0.2), extensions=1)
    point = modules.plan.search_of(asked, "adamw", {}).points[0]
    for best, beyond in ((0.05, 0.025), (0.2, 0.4)):
        results = {
            p.key: ended(abs(p.lr - 2.0) + abs(p.weight_decay - best))
            for p in modules.plan.search_of(asked, "adamw", {}).points
        }
        assert [p.weight_decay for p in modules.plan.search_of(asked, "adamw", results).points[6:]] == [beyond]
        closed = modules.plan.search_of(asked, "adamw", results, closed=True)  # never run: the best of what was
        assert closed.complete
        assert (closed.best.lr, closed.best.weight_decay, closed.at_edge) == (2.0, best, True)
        further = dataclasses.replace(point, lr=2.0, weight_decay=beyond)
        search = modules.plan.search_of(asked, "adamw", {**results, further.key: ended(9.0)})
        assert search.complete
        assert not search.at_edge


def test_a_sphere_is_searched_on_axes_of_its_own(modules: Any) -> None:
    asked = study(modules, sphere_learning_rates=(1e-3, 2e-3), spheres=(1.0, 2.0), extensions=2)
    results: dict[str, Any] = {}
    while not (search := modules.plan.search_of(asked, "c3o sphere", results)).complete:
        for point in search.points:
            sphere = dict(point.c3o)["c3o_sphere"]
            assert (point.optimizer, point.weight_decay) == ("c3o", 0.05)
            results[point.key] = ended(abs(point.lr - 2e-3) + abs(sphere - 4.0))
    places = [modules.plan.place_of("c3o sphere", p) for p in search.points]
    assert places[:4] == [(1e-3, 1.0), (1e-3, 2.0), (2e-3, 1.0), (2e-3, 2.0)]
    assert places[4:] == [(4e-3, 2.0), (2e-3, 4.0)]  # learning rate first, then the sphere
    assert modules.plan.place_of("c3o sphere", search.best) == (2e-3, 4.0)
    assert search.at_edge
    assert len(modules.plan.search_of(study(modules), "c3o sphere", {}).points) + 2 < 12  # the default's price


def _losses(modules: Any, asked: Any, loss: Any) -> list[tuple[str, float]]:
    point = modules.plan.search_of(asked, "adamw", {}).points[0]
    specs = [dataclasses.replace(point, lr=float(2**i)) for i in range(8)]
    return [(s.key, loss(s.lr)) for s in specs]


def test_nothing_is_chosen_where_every_point_failed(modules: Any) -> None:
    asked = study(modules, optimizers=("adamw",), stages=("search", "finals"))
    results = {p.key: ended(None, "oom") for p in modules.plan.search_of(asked, "adamw", {}).points}
    items, waiting = modules.plan.plan(asked, results)
    assert {item.stage for item in items} == {"search"}
    assert waiting == ["the search of adamw has no point that was trained to the end"]


def test_one_run_serves_all_places_that_compute_the_same(modules: Any) -> None:
    best = {"c3o": (1e-3, 0.1), "c3o sphere": (4e-3, 2.0), "adamw": (2e-3, 0.1), "muon": (3e-3, 0.1)}
    asked = study(modules, best=best, final_tokens=10_000, ablate_tokens=100_000)
    items, waiting = modules.plan.plan(asked, {})
    assert not waiting
    at = {(i.stage, i.label, i.spec.seed): i.spec for i in items}
    assert at["finals", "c3o", 1].key == at["instant", "none", 1].key
    assert at["ablate", "base", 1].key == at["storage", "fp32 weights, fp32 state", 1].key  # 1,000 steps both
    assert at["finals", "c3o", 1].key != at["finals", "c3o", 2].key
    assert at["finals", "c3o", 1].steps == at["finals", "adamw", 1].steps == 100
    assert at["finals", "c3o, shorter", 1].steps == 87  # a decay of its own
    sphere = at["finals", "c3o sphere", 1]
    assert (sphere.optimizer, sphere.lr, sphere.weight_decay, sphere.c3o) == ("c3o", 4e-3, 0.05, (("c3o_sphere", 2.0),))
    assert at["finals", "c3o sphere, shorter", 1] == dataclasses.replace(sphere, steps=87)
    assert at["ablate", "Nesterov", 1].lr == 1e-3  # at C3O's own best point
    assert at["ablate", "sphere on hidden matrices", 1] == dataclasses.replace(sphere, steps=1000)  # at the sphere's
    assert at["ablate", "sphere on hidden matrices, Nesterov", 1].c3o == (("c3o_nesterov", True), ("c3o_sphere", 2.0))
    restored = modules.plan.Study.from_json(json.loads(json.dumps(dataclasses.asdict(asked))))
    assert restored == asked
    assert [i.spec.key for i in modules.plan.plan(restored, {})[0]] == [i.spec.key for i in items]


def test_an_ablation_of_what_is_gone_is_shown_where_it_was_run_and_never_run(modules: Any) -> None:
    asked = study(modules, stages=("ablate",), best={"c3o": (1e-3, 0.1), "c3o sphere": (4e-3, 2.0)})
    assert {i.label for i in modules.plan.plan(asked, {})[0]}.isdisjoint(modules.plan.WITHDRAWN)
    [(label, settings)] = modules.plan.WITHDRAWN.items()
    past = asked.spec("c3o", 1e-3, 0.1, asked.steps(asked.ablate_tokens), 1, c3o=settings)
    items = modules.plan.plan(asked, {past.key: ended(2.0)})[0]
    assert [i for i in items if i.label == label] == [modules.plan.Item("ablate", label, past)]


def test_settings_of_every_c3o_are_those_of_no_other(modules: Any) -> None:
    asked = study(modules, stages=("search",))
    capless = dataclasses.replace(asked, c3o=(("c3o_trust_radius", 0.0),))
    keys = {o: {p.key for p in modules.plan.search_of(asked, o, {}).points} for o in ("c3o", "adamw")}
    assert keys["adamw"] == {p.key for p in modules.plan.search_of(capless, "adamw", {}).points}
    assert not keys["c3o"] & {p.key for p in modules.plan.search_of(capless, "c3o", {}).points}


def test_all_settings_are_those_of_the_product(modules: Any) -> None:
    from eco_llm.config import C3OConfig, InstantConfig

    plan = modules.plan
    C3OConfig(**plan.UNSAID).validate()
    for settings in [*plan.ABLATIONS.values(), *plan.SPHERE_ABLATIONS.values(), *(s for _, s in plan.STORAGE.values())]:
        C3OConfig(**dict(settings)).validate()
    for settings in plan.INSTANT.values():
        InstantConfig(**dict(settings)).validate()


# ---- the queue ---------------------------------------------------------------------------------------------


def test_a_line_cut_short_costs_no_other(modules: Any, tmp_path: Path) -> None:
    queue = modules.queue.Queue(tmp_path)
    queue.append({"kind": "run", "key": "a", "status": "done", "loss": float("nan")})
    with queue.file.open("ab") as stream:
        stream.write(b'{"kind": "run", "key": "b", "sta')
    queue.append({"kind": "run", "key": "c", "status": "crashed"})
    queue.append({"kind": "run", "key": "d", "status": "oom"})
    assert [line["key"] for line in queue.lines()] == ["a", "c", "d"]
    assert set(queue.results()) == {"a", "d"}  # a crash is tried again


def test_a_claim_dies_with_its_holder_and_a_finished_run_is_not_given_out(modules: Any, tmp_path: Path) -> None:
    queue = modules.queue.Queue(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, 'benchmarks')\n"
        "from quality_queue import Queue\n"
        f"held = Queue(Path({str(tmp_path)!r})).claim('a'); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, env=_environment()) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"held"
        assert queue.claim("a") is None
        other.kill()
    claim = queue.claim("a")
    assert claim is not None
    queue.append({"kind": "run", "key": "a", "status": "done"})
    claim.release()
    assert queue.claim("a") is None


def _drive(modules: Any, queue: Any, asked: Any, seconds: float = 0.0, end: float = float("inf")) -> list[Any]:
    """`pull` with runs that only take time; what it attempted."""
    done = []

    def attempt(item: Any) -> bool:
        time.sleep(seconds)
        done.append(item)
        queue.append({"key": item.spec.key, **ended(item.spec.lr)})
        return True

    modules.quality.pull(asked, queue, end, attempt, lambda item, results: 1.0, lambda spec: False)
    return done


def test_two_processes_share_the_work_and_the_finals_wait_for_the_search(modules: Any, tmp_path: Path) -> None:
    asked = study(modules, optimizers=("c3o", "adamw"), stages=("search", "finals"), extensions=1)
    both: list[list[Any]] = [[], []]

    def one(index: int) -> None:
        both[index] = _drive(modules, modules.queue.Queue(tmp_path), asked, seconds=0.02)

    threads = [threading.Thread(target=one, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    keys = [item.spec.key for done in both for item in done]
    assert len(keys) == len(set(keys)) == 2 * 7 + 6  # 6 points and one beyond the edge each; 2 seeds of 3 finals
    assert all(both)
    results = modules.queue.Queue(tmp_path).results()
    assert set(results) == set(keys) == {i.spec.key for i in modules.plan.plan(asked, results)[0]}
    assert _drive(modules, modules.queue.Queue(tmp_path), asked) == []  # nothing twice


def test_nothing_is_begun_that_would_end_too_late(
    modules: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = study(modules, optimizers=("adamw",), stages=("search", "finals"))
    assert _drive(modules, modules.queue.Queue(tmp_path), asked, end=time.time() + 0.5) == []
    said = capsys.readouterr().out
    assert said.count("not begun, too late: search, adamw") == 6
    assert "the search of adamw is not complete" in said


def test_workers_begin_with_different_models_and_stay_with_what_they_have(modules: Any) -> None:
    asked = study(modules, best={"c3o": (1e-3, 0.1)}, optimizers=("c3o",), stages=("instant",))
    items, _ = modules.plan.plan(asked, {})
    have: set[Any] = {items[0].spec.variant}
    turns = [modules.quality._turns(items, lambda spec: spec.variant in have, worker) for worker in (0, 1)]
    assert [turn[items[0].spec.variant] for turn in turns] == [0, 0]
    firsts = [min((v for v in turn if v not in have), key=turn.__getitem__) for turn in turns]
    assert firsts[0] != firsts[1]
    assert all(sorted(turn.values()) == [0, 1, 2, 3, 4] for turn in turns)


# ---- the tables --------------------------------------------------------------------------------------------


def test_a_difference_is_judged_against_the_noise(modules: Any) -> None:
    tables = modules.tables
    losses = {
        "base": {1: 2.0, 2: 2.1},
        "better": {1: 1.5, 2: 1.6},
        "same": {1: 2.05, 2: 2.1},
        "lost": {1: None, 2: 2.0},
    }
    noise = tables.noise_of(losses, list(losses))
    assert noise == pytest.approx(0.1)
    assert tables.difference(losses, "better", "base") == pytest.approx([-0.5, -0.5])
    assert tables.difference(losses, "lost", "base") == pytest.approx([-0.1])
    assert tables.mean(losses["lost"]) is None
    assert tables.verdict(-0.5, noise) == "better"
    assert tables.verdict(0.025, noise) == "within the noise"
    assert tables.verdict(0.2, noise) == "worse"
    assert "no noise" in tables.verdict(0.2, None)


# ---- training ----------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _trainer(modules: Any) -> Any:
    from eco_llm.cli.parse import parse
    from eco_llm.config import TrainConfig
    from eco_llm.runtime import Runtime

    config = parse(TrainConfig, modules.quality.PRESETS["tiny"][0], prog="quality")
    return modules.train.Trainer(config, Runtime.detect(config.runtime))


def test_a_run_begins_as_a_new_model_of_its_seed_would(modules: Any) -> None:
    trainer = _trainer(modules)
    settings = modules.plan.INSTANT["compress, 8 bits"]
    spec = modules.plan.Spec("", "c3o", 1e-3, 0.1, 10, seed=3, instant=settings)
    model = trainer.model(spec)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    fresh = model.stack.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model.stack._decided.bits[0] = 4
    model.stack._decided.reviewed = 5
    other = trainer.model(dataclasses.replace(spec, seed=4))
    assert other is model  # nothing is compiled anew
    assert model.stack.state_dict() == fresh
    assert not torch.equal(model.embedding.weight, first["embedding.weight"])
    again = trainer.model(dataclasses.replace(spec, optimizer="muon")).state_dict()
    assert all(torch.equal(again[k], first[k]) for k in first)  # the same for every optimizer
    assert trainer.model(dataclasses.replace(spec, weights="bf16")) is not model


class StandIn:
    """A graph whose replay runs the work again and, as a graph's would, writes over what capture left."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = parameters

    def warm_up(self, work: Any) -> None:
        work()

    def capture(self, work: Any, phases: Any) -> Any:
        assert all(p.grad is None for p in self._parameters)
        self._work, self._output = work, work()
        self._gradients = [p.grad for p in self._parameters]
        assert phases.names == ["forward", "backward"]
        for place in (self._output.values, *self._gradients):
            place.fill_(float("nan"))  # nothing has run yet
        return self._output

    def replay(self, timer: Any, phases: Any) -> None:
        def launch() -> None:
            for p in self._parameters:
                p.grad = None
            with timer.capturing():
                self._output.values.copy_(self._work().values)
            for p, place in zip(self._parameters, self._gradients, strict=True):
                place.copy_(p.grad)
                p.grad = place

        timer.replay(phases, lambda marks: [mark.record() for mark in marks], launch)

    def abandon(self) -> None:
        raise AssertionError("capture failed")


def test_a_graph_of_forward_and_backward_trains_as_the_product_does(modules: Any) -> None:
    from eco_llm.data.loader import Batch
    from eco_llm.optim.factory import build_optimizer
    from eco_llm.optim.update import Update
    from eco_llm.perf.phases import HostMark, PhaseTimer
    from eco_llm.training.step import TrainStep

    trainer = _trainer(modules)
    tokens = torch.randint(1, 300, (6, 2, 4, 32), generator=torch.Generator().manual_seed(0))

    def losses(graphed: bool) -> tuple[list[float], list[torch.Tensor]]:
        spec = modules.plan.Spec("", "muon", 1e-2, 0.1, 6, seed=0)
        config, model = trainer.settings(spec), trainer.model(spec)
        optimizer = build_optimizer(model.parameter_groups(0.1), config.optimizer, config.c3o, "cpu")
        timer = PhaseTimer("cuda:0", make_mark=HostMark)  # events mode, on the host's clock
        source: Any = iter([Batch(pair[0], pair[1]) for pair in tokens])
        step: Any = TrainStep(model, Update(optimizer, config.optimizer), source, trainer.runtime, timer, 1)
        if graphed:
            stand_in = StandIn(list(model.parameters()))
            step = modules.train.BackwardGraph(step, trainer.runtime, (4, 32), make_graph=lambda device: stand_in)
        seen = []
        for _ in range(6):
            timer.begin_step()
            step.prepare()
            timer.mark_core_begin()
            output = step.run()
            timer.mark_core_end()
            timer.end_step()
            assert output.names == ("loss", "grad_norm", "applied")
            assert output.values[2] == 1
            seen.append(float(output.values[0]))
        model.zero_grad(set_to_none=True)
        return seen, [p.detach().clone() for p in model.parameters()]

    plain, graphed = losses(False), losses(True)
    assert graphed[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(graphed[1], plain[1], strict=True))
    assert plain[0][-1] < plain[0][0]


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_compiled_twice_and_no_memory_stays(modules: Any, tmp_path: Path) -> None:
    from eco_llm.cli.parse import parse
    from eco_llm.config import TrainConfig
    from eco_llm.runtime import Runtime

    flags = ["--d-model", "128", "--n-layers", "2", "--mamba-ratio", "1", "--n-heads", "2", "--vocab-size", "512",
             "--batch-size", "4", "--seq-len", "256", "--data", str(ROOT / "eco_llm"), "--val-fraction", "0.05",
             "--eval-batches", "2", "--data-cache", str(tmp_path)]  # fmt: skip
    config = parse(TrainConfig, flags, prog="quality")
    trainer = modules.train.Trainer(config, Runtime.detect(config.runtime))
    data, _ = modules.quality.prepared(config)
    first = modules.plan.Spec("", "c3o", 3e-3, 0.1, 30, seed=0)
    trainer.warm_up(first)
    credit = (("c3o_credit_gain", 1.0),)
    kinds = [
        {},
        {"optimizer": "adamw"},
        {"optimizer": "muon"},
        {"c3o": credit},
        {"instant": (("instant_mode", "coupled"),)},
    ]
    held = []
    for turn in (0, 1):
        for kind in kinds:
            record = trainer.run(dataclasses.replace(first, seed=turn, **kind), data)
            assert record["status"] == "done", record["why"]
            assert "graph" in record["how"]
            assert "no graph" not in record["how"]
            assert record["final_loss"] < 6.2
            assert record["graphs_compiled"] == 0 or turn == 0
        held.append(torch.cuda.memory_allocated())
    assert held[1] <= held[0] + 2**20


def _study(folder: Path, *further: str, stages: str = "search") -> str:
    command = [
        sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--preset", "tiny", "--runs", str(folder / "runs"),
        "--data-cache", str(folder / "cache"), "--stages", stages, "--search-tokens", "384", *further,
    ]  # fmt: skip
    done = subprocess.run(command, env=_environment(), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _runs(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "runs" / "runs.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "run"]


@pytest.mark.slow
def test_every_stage_ends_in_evidence_and_a_second_launch_does_nothing(modules: Any, tmp_path: Path) -> None:
    sizes = ["--final-tokens", "640", "--ablate-tokens", "640", "--storage-steps", "4", "--seeds", "1,2"]
    sizes += ["--learning-rates", "4e-3", "--spheres", "2", "--extensions", "0"]
    _study(tmp_path, "--workers", "2", *sizes, stages="search,finals,ablate,instant,storage")
    runs = _runs(tmp_path)
    assert len({r["key"] for r in runs}) == len(runs)
    assert {r["worker"] for r in runs} == {0, 1}
    assert {r["status"] for r in runs} == {"done"}
    assert all(r["steps"] * 128 == r["tokens"] and r["curve"] and r["held_out_tokens"] > 500 for r in runs)

    assert "seed" not in _study(tmp_path, *sizes, stages="search,finals,ablate,instant,storage")
    assert _runs(tmp_path) == runs

    written = {
        p.stem: json.loads(p.read_text()) for p in modules.tables.collect(tmp_path / "runs/runs.jsonl", tmp_path)
    }
    assert set(written) == {f"quality_{n}" for n in ("search", "optimizers", "ablation", "instant", "storage")}
    for evidence in written.values():
        assert evidence["missing"] == []
        assert evidence["environment"]["device"] == "cpu"
        assert all(len(row) == len(evidence["table"]["header"]) for row in evidence["table"]["rows"])
    finals = written["quality_optimizers"]
    assert [row[0] for row in finals["table"]["rows"]] == [
        "c3o", "c3o, shorter", "c3o sphere (2)", "c3o sphere, shorter (2)", "adamw", "muon",
    ]  # fmt: skip
    by_hand = [
        next(s["final_loss"] for s in finals["samples"] if s["label"] == label and s["spec"]["seed"] == seed)
        for seed in (1, 2)
        for label in ("c3o, shorter", "adamw")
    ]
    delta = (by_hand[0] - by_hand[1] + by_hand[2] - by_hand[3]) / 2
    assert finals["summary"]["shorter_minus_adamw"] == pytest.approx(delta)
    assert finals["summary"]["bar_met"] == (delta <= 0)
    assert len(written["quality_ablation"]["table"]["rows"]) == 1 + len(modules.plan.ABLATIONS) + len(
        modules.plan.SPHERE_ABLATIONS
    )
    assert len(written["quality_storage"]["table"]["rows"]) == 8
    assert len(written["quality_instant"]["table"]["rows"]) == 5

    sys.modules.pop("render", None)
    render = __import__("render")
    for path in tmp_path.glob("*/*.json"):
        assert render.own_table([json.loads(path.read_text()) | {"hardware": "here"}]).count("\n") > 2


@pytest.mark.slow
def test_a_run_that_diverges_is_recorded_and_not_chosen_and_a_deadline_stops_in_time(
    modules: Any, tmp_path: Path
) -> None:
    absurd = ["--optimizers", "adamw", "--learning-rates", "2e-3,80", "--extensions", "1"]
    assert "too late" in _study(tmp_path, *absurd, "--deadline", "0.001")
    assert not _runs(tmp_path)
    said = _study(tmp_path, *absurd)
    runs = {r["spec"]["lr"]: r for r in _runs(tmp_path)}
    assert runs[80.0]["status"] == "diverged"
    assert runs[80.0]["why"]
    assert "diverged" in said
    with (tmp_path / "runs" / "runs.jsonl").open("a") as stream:
        stream.write(json.dumps({"kind": "start", "data_fingerprint": "another"}) + "\n")
    with pytest.raises(AssertionError, match="has runs on other data"):
        _study(tmp_path, *absurd)
    lines = (tmp_path / "runs" / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs" / "runs.jsonl").write_text("".join(lines[:-1]))
    [path] = modules.tables.collect(tmp_path / "runs" / "runs.jsonl", tmp_path)
    evidence = json.loads(path.read_text())
    assert evidence["summary"]["adamw_lr"] < 80
    shown = {row[1]: (row[-2], row[-1]) for row in evidence["table"]["rows"]}
    assert shown["80"] == ("diverged", "")
    assert shown["0.002"][1] or shown["0.001"][1]


def test_bad_flags_are_refused_in_one_line(modules: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bad = (["--stages", "serch"], ["--best", "adam=1:2"], ["--c3o", "trust=1"], ["--c3o", "cautious=1"],
           ["--d-model", "7x"], ["--learning-rates", "a"], ["--search-tokens", "0"], ["--spheres", "200"],
           ["--collect", "/nowhere/runs.jsonl"])  # fmt: skip
    for flags in bad:
        try:
            code = modules.quality.main(["--preset", "tiny", *flags])
        except SystemExit as refused:  # argparse's own
            code = refused.code
        assert code == 2, flags
        assert capsys.readouterr().err.strip()
