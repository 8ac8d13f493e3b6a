"""Which runs the quality study consists of: a pure function of its settings and of the results so far. Torch-free.

A run is known by what it computes (`Spec.key`), not by who asked for it: INSTANT's `none` and the finals' C3O are one
run. The plan grows with the results: an optimizer's best search point is known only when its search is complete, and a
search whose best point lies at the edge of its grid goes on beyond it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STAGES = ("search", "finals", "ablate", "instant", "storage")
SPHERE = "c3o sphere"
"""C3O whose hidden matrices are on a sphere, which has a search of its own: the learning rate moves embeddings and
head, learning rate × sphere the matrices; weight decay is left to the first two, and is fixed."""
OPTIMIZERS = ("c3o", SPHERE, "adamw", "muon")
SHORTER = 0.87
"""Issue's bar: C3O reaches AdamW's final loss with this share of the tokens, in a decay of its own."""
ENDED = ("done", "diverged", "oom")
"""What a run may end as that is a result; a crash is none, and is tried again by the next launch."""

Settings = tuple[tuple[str, Any], ...]
ABLATIONS: dict[str, Settings] = {
    "trust cap off": (("c3o_trust_radius", 0.0),),
    "block credit on, gain 1": (("c3o_credit_gain", 1.0),),
    "Nesterov": (("c3o_nesterov", True),),
}
WITHDRAWN: dict[str, Settings] = {"cautious weight decay": (("c3o_cautious", True),)}
"""Ablations of what C3O no longer has: shown where they were run, never to be run."""
UNSAID: dict[str, Any] = {"c3o_nesterov": False}
"""What a run has whose settings do not say. The study began before these were C3O's defaults, and its keys say so."""
SPHERE_ABLATIONS: dict[str, Settings] = {
    "sphere on hidden matrices": (),
    "sphere on hidden matrices, Nesterov": (("c3o_nesterov", True),),
}
"""At the sphere's own best point, against the same base: its learning rate is another quantity than C3O's."""
INSTANT: dict[str, Settings] = {
    "none": (),
    "coupled": (("instant_mode", "coupled"),),
    "compress, 8 bits": (("instant_mode", "compress"), ("instant_bits", "8")),
    "compress, 4 bits": (("instant_mode", "compress"), ("instant_bits", "4")),
    "fixed-point, 3e-3": (("instant_mode", "fixed-point"), ("instant_reversible_tol", 3e-3)),
}
STORAGE: dict[str, tuple[str, Settings]] = {
    "fp32 weights, fp32 state": ("fp32", ()),
    "fp32 weights, bf16 state": ("fp32", (("c3o_state_dtype", "bf16"),)),
    "fp32 weights, int8 state": ("fp32", (("c3o_state_dtype", "int8"),)),
    "fp32 weights, int4 state": ("fp32", (("c3o_state_dtype", "int4"),)),
    "bf16 weights, bf16 state": ("bf16", (("c3o_state_dtype", "bf16"),)),
    "bf16 weights, int8 state": ("bf16", (("c3o_state_dtype", "int8"),)),
    "bf16 weights + 8 error bits, bf16 state": ("bf16", (("c3o_error_bits", 8), ("c3o_state_dtype", "bf16"))),
    "bf16 weights + 8 error bits, int8 state": ("bf16", (("c3o_error_bits", 8), ("c3o_state_dtype", "int8"))),
}


@dataclass(frozen=True)
class Spec:
    """One run, up to what changes its numbers."""

    base: str
    """The flags of eco_train that all runs share, as one line."""
    optimizer: str
    lr: float
    weight_decay: float
    steps: int
    seed: int
    """Of initialisation and of the order of the data, the same for every optimizer."""
    c3o: Settings = ()
    instant: Settings = ()
    weights: str = "fp32"

    @property
    def key(self) -> str:
        """12 hex digits."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    @property
    def variant(self) -> tuple[Any, ...]:
        """Runs with the same one share a compiled model."""
        return (self.weights, self.instant)

    @property
    def kind(self) -> str:
        """Runs of one kind take the same time a token."""
        c3o = dict(self.c3o)
        return json.dumps([self.optimizer, c3o.get("c3o_credit_gain", 0.0), *self.variant])


@dataclass(frozen=True)
class Item:
    """A run's place in a table. One run may have several."""

    stage: str
    label: str
    spec: Spec


@dataclass(frozen=True)
class Study:
    """What a launch is told."""

    flags: tuple[str, ...]
    tokens_per_step: int
    stages: tuple[str, ...]
    optimizers: tuple[str, ...] = OPTIMIZERS
    search_tokens: int = 15_000_000
    final_tokens: int = 61_000_000
    ablate_tokens: int = 32_768_000  # 1,000 steps of the preset: its base is also that of the storages
    storage_steps: int = 1000
    seeds: tuple[int, ...] = (1, 2)
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    weight_decays: tuple[float, ...] = (0.05, 0.2)
    sphere_learning_rates: tuple[float, ...] = (4e-3, 8e-3, 16e-3)
    spheres: tuple[float, ...] = (2.0, 4.0, 8.0)
    sphere_weight_decay: float = 0.05
    extensions: int = 2
    """Most points that a search may add beyond the edges of its grid."""
    instant: tuple[str, ...] = tuple(INSTANT)
    c3o: Settings = ()
    """What every C3O of the study has, unless a stage says otherwise."""
    best: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(lr, weight decay), with a sphere (lr, sphere), of optimizers whose search is not asked."""

    def steps(self, tokens: float) -> int:
        """Optimizer steps for at least so many tokens."""
        return max(1, -int(-tokens // self.tokens_per_step))

    def grid(self, optimizer: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Learning rates, and weight decays or spheres, that its search begins with."""
        if optimizer == SPHERE:
            return self.sphere_learning_rates, self.spheres
        return self.learning_rates, self.weight_decays

    def spec(
        self, optimizer: str, lr: float, second: float, steps: int, seed: int, c3o: Settings = (), **further: Any
    ) -> Spec:
        """A run of an optimizer at a point of its search; `c3o`: changes beyond those of every C3O."""
        lr, second = float(f"{lr:.4g}"), float(f"{second:.4g}")
        settings: Settings = ()
        if optimizer in ("c3o", SPHERE):
            own = {"c3o_sphere": second} if optimizer == SPHERE else {}
            settings = tuple(sorted({**dict(self.c3o), **own, **dict(c3o)}.items()))
        decay = self.sphere_weight_decay if optimizer == SPHERE else second
        rule = "c3o" if optimizer == SPHERE else optimizer
        return Spec(" ".join(self.flags), rule, lr, decay, steps, seed, c3o=settings, **further)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Study:
        """What `dataclasses.asdict` and JSON made of one."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        values["c3o"] = tuple((name, value) for name, value in raw["c3o"])
        values["best"] = {name: (pair[0], pair[1]) for name, pair in raw["best"].items()}
        return Study(**values)


Results = Mapping[str, Mapping[str, Any]]
"""Spec.key → the record of a run that has ended (`ENDED`)."""


@dataclass(frozen=True)
class Search:
    """One optimizer's search so far."""

    optimizer: str
    points: list[Spec]
    """All that belong to it by now, those still to run too."""
    complete: bool
    best: Spec | None
    """When complete: the point of least loss; None if no point was trained to the end."""

    @property
    def at_edge(self) -> bool:
        """Whether the best point's learning rate or weight decay (sphere) is the least or the largest tried at all: the
        optimum may lie beyond.
        """
        if self.best is None:
            return False
        axes = zip(*(place_of(self.optimizer, p) for p in self.points), strict=True)
        best = place_of(self.optimizer, self.best)
        return any(len(set(tried)) > 1 and x in (min(tried), max(tried)) for tried, x in zip(axes, best, strict=True))


def place_of(optimizer: str, spec: Spec) -> tuple[float, float]:
    """A run's place in its optimizer's search: learning rate, and weight decay or sphere."""
    return spec.lr, dict(spec.c3o)["c3o_sphere"] if optimizer == SPHERE else spec.weight_decay


def loss_of(results: Results, spec: Spec) -> float | None:
    """Final held-out loss, nats per token; None for a run that has not been, or did not end well."""
    record = results.get(spec.key)
    return None if record is None or record["status"] != "done" else float(record["final_loss"])


def search_of(study: Study, optimizer: str, results: Results, *, closed: bool = False) -> Search:
    """The grid, and beyond the edge on which its best point lies, as far as `extensions` go; `closed`: or as far as it
    was run.
    """

    def point(lr: float, second: float) -> Spec:
        return study.spec(optimizer, lr, second, study.steps(study.search_tokens), seed=0)

    rates, seconds = study.grid(optimizer)
    points = [point(lr, second) for lr in rates for second in seconds]
    for _ in range(study.extensions + 1):
        if any(p.key not in results for p in points):
            return Search(optimizer, points, False, None)
        ended = [(loss, i) for i, p in enumerate(points) if (loss := loss_of(results, p)) is not None]
        if not ended:
            return Search(optimizer, points, True, None)
        best = points[min(ended)[1]]
        further = _beyond(optimizer, points, best, point)
        most = len(rates) * len(seconds) + study.extensions
        if further is None or len(points) >= most or (closed and further.key not in results):
            return Search(optimizer, points, True, best)
        points = [*points, further]
    raise AssertionError("a search is extended at most `extensions` times")


def _beyond(optimizer: str, points: Sequence[Spec], best: Spec, point: Any) -> Spec | None:
    """The next point past the edge on which the best one lies; learning rate first."""
    rates, seconds = (set(axis) for axis in zip(*(place_of(optimizer, p) for p in points), strict=True))
    lr, second = place_of(optimizer, best)
    tries = []
    if lr == max(rates):
        tries.append(point(2 * lr, second))
    elif lr == min(rates):
        tries.append(point(lr / 2, second))
    if second == max(seconds) and len(seconds) > 1:
        tries.append(point(lr, 2 * second))
    elif second == min(seconds) and len(seconds) > 1:
        tries.append(point(lr, second / 2))
    known = {p.key for p in points}
    return next((p for p in tries if p.key not in known), None)


def plan(study: Study, results: Results, *, closed: bool = False) -> tuple[list[Item], list[str]]:
    """All items known by now, most important first, and what is still unknown, for people.

    `closed` as of `search_of`.
    """
    items: list[Item] = []
    waiting: list[str] = []
    best: dict[str, tuple[float, float]] = dict(study.best)
    for optimizer in study.optimizers:
        if optimizer in best:
            continue
        search = search_of(study, optimizer, results, closed=closed)
        if "search" in study.stages:
            items += [Item("search", optimizer, p) for p in search.points]
        if search.best is not None:
            best[optimizer] = place_of(optimizer, search.best)
        elif any(_needs(stage, optimizer) for stage in study.stages):
            why = "has no point that was trained to the end" if search.complete else "is not complete"
            waiting.append(f"the search of {optimizer} {why}")

    def runs(
        stage: str, label: str, optimizer: str, steps: int, seed: int, c3o: Settings = (), *, ended: bool = False,
        **further: Any,
    ) -> None:  # fmt: skip
        """`ended`: only if it was run."""
        if optimizer in best:
            spec = study.spec(optimizer, *best[optimizer], steps, seed, c3o, **further)
            if not ended or spec.key in results:
                items.append(Item(stage, label, spec))

    whole = study.steps(study.final_tokens)
    if "finals" in study.stages:
        for seed in study.seeds:
            for optimizer in study.optimizers:
                runs("finals", optimizer, optimizer, whole, seed)
                if optimizer in ("c3o", SPHERE):
                    shorter = study.steps(SHORTER * study.final_tokens)
                    runs("finals", f"{optimizer}, shorter", optimizer, shorter, seed)
    if "ablate" in study.stages:
        for seed in study.seeds:
            for label, settings in {"base": (), **ABLATIONS}.items():
                runs("ablate", label, "c3o", study.steps(study.ablate_tokens), seed, c3o=settings)
            for label, settings in WITHDRAWN.items():
                runs("ablate", label, "c3o", study.steps(study.ablate_tokens), seed, c3o=settings, ended=True)
            for label, settings in SPHERE_ABLATIONS.items():
                runs("ablate", label, SPHERE, study.steps(study.ablate_tokens), seed, c3o=settings)
    if "instant" in study.stages:
        for label in study.instant:  # by mode, so that a process compiles each but once
            for seed in study.seeds:
                runs("instant", label, "c3o", whole, seed, instant=INSTANT[label])
    if "storage" in study.stages:
        for label, (weights, settings) in STORAGE.items():
            for seed in study.seeds:
                runs("storage", label, "c3o", study.storage_steps, seed, c3o=settings, weights=weights)
    order = {stage: i for i, stage in enumerate(study.stages)}
    return sorted(items, key=lambda item: order[item.stage]), waiting


def _needs(stage: str, optimizer: str) -> bool:
    return stage == "finals" or (stage in ("ablate", "instant", "storage") and optimizer == "c3o")
