"""From the quality study's lines to its evidence files. Torch-free.

How a difference is judged: runs of one seed share initialisation and the order of their data, so a difference is taken
seed by seed and then averaged. Beside it stands the noise: the largest range of one configuration's losses over the
seeds, among the configurations compared. A difference inside the noise shows nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, write_evidence
from quality_plan import (
    SHORTER,
    SPHERE,
    STAGES,
    Item,
    Results,
    Spec,
    Study,
    loss_of,
    place_of,
    plan,
    search_of,
)  # fmt: skip
from quality_queue import read_lines, results_of

from eco_llm.errors import UserError

WITHIN = 0.005
"""Issue's bar for the coupled form, nats per token."""
WITHIN_STORAGE = 0.002
"""Issue's bar for storages of the state."""

Losses = dict[str, dict[int, float | None]]
"""label → seed → final held-out loss, None where the run did not end well or has not been."""


def collect(path: Path, results: Path = RESULTS) -> list[Path]:
    """Write the evidence of every stage that has a finished run; the files written.

    Raises:
        UserError: the file has no study in it, or no run that has ended.
    """
    lines = read_lines(path)
    starts = [line for line in lines if line["kind"] == "start"]
    runs = results_of(lines)
    if not starts or not runs:
        raise UserError(f"--collect {path}: there is no finished run in it")
    written = []
    for stage in STAGES:
        of_stage = [s for s in starts if stage in s["study"]["stages"]]
        if not of_stage:
            continue
        study = Study.from_json(of_stage[-1]["study"])
        items = [item for item in plan(study, runs, closed=True)[0] if item.stage == stage]
        samples = [_sample(item, runs[item.spec.key]) for item in items if item.spec.key in runs]
        if not samples:
            continue
        missing = sorted({f"{i.label}, seed {i.spec.seed}" for i in items if i.spec.key not in runs})
        claim, payload = _BUILDERS[stage](study, items, runs)
        start = of_stage[-1]
        payload |= {
            "missing": missing,
            "study": start["study"],
            "model": {k: start[k] for k in ("parameters", "parameters_without_embedding", "flops_per_token")},
            "data": {
                k: start[k] for k in ("training_tokens", "held_out_tokens", "bytes_per_token", "data_fingerprint")
            },
            "how_judged": __doc__.partition("\n\n")[2].strip() if __doc__ else "",
            "samples": samples,
        }
        payload["summary"] |= {"parameters": start["parameters"], "runs": len(samples), "missing": len(missing)}
        written.append(write_evidence(claim, payload, results=results, recorded=start["environment"]))
    return written


def _sample(item: Item, record: Any) -> dict[str, Any]:
    return {**{k: v for k, v in record.items() if k != "kind"}, "stage": item.stage, "label": item.label}


def losses_of(items: Sequence[Item], results: Results) -> Losses:
    """By label and seed, in the plan's order."""
    found: Losses = {}
    for item in items:
        found.setdefault(item.label, {})[item.spec.seed] = loss_of(results, item.spec)
    return found


def mean(by_seed: dict[int, float | None]) -> float | None:
    """Of the seeds; None unless every seed has a loss."""
    values = list(by_seed.values())
    return statistics.fmean(v for v in values if v is not None) if values and None not in values else None


def spread(by_seed: dict[int, float | None]) -> float | None:
    """Largest minus least loss over the seeds; None for fewer than two."""
    values = [v for v in by_seed.values() if v is not None]
    return max(values) - min(values) if len(values) > 1 else None


def noise_of(losses: Losses, labels: Sequence[str]) -> float | None:
    """The largest spread among these configurations; None if none has two seeds."""
    return max((s for label in labels if (s := spread(losses.get(label, {}))) is not None), default=None)


def difference(losses: Losses, label: str, against: str) -> list[float]:
    """Loss minus that of `against`, for each seed that both have."""
    ours, theirs = losses.get(label, {}), losses.get(against, {})
    pairs = ((ours[s], theirs.get(s)) for s in ours)
    return [a - b for a, b in pairs if a is not None and b is not None]


def verdict(delta: float, noise: float | None) -> str:
    """In words; less loss is better."""
    if noise is None:
        return "one seed: no noise known"
    if abs(delta) <= noise:
        return "within the noise"
    return "better" if delta < 0 else "worse"


def _search(study: Study, items: list[Item], results: Results) -> tuple[str, dict[str, Any]]:
    rows: list[list[Any]] = []
    summary: dict[str, Any] = {}
    for optimizer in study.optimizers:
        search = search_of(study, optimizer, results, closed=True)
        for point in sorted(search.points, key=lambda p: (p.lr, p.weight_decay)):
            if point.key in results:
                chosen = "best" + (", at the edge" if search.at_edge else "") if point == search.best else ""
                rows.append([_shown(optimizer, point), f"{point.lr:g}", f"{point.weight_decay:g}", *_size(study, point),
                             _loss(results, point), chosen])  # fmt: skip
        name = optimizer.replace(" ", "_")
        summary[f"{name}_points"] = sum(p.key in results for p in search.points)
        if search.best is not None:
            lr, second = place_of(optimizer, search.best)
            summary |= {f"{name}_lr": lr, f"{name}_{'scale' if optimizer == SPHERE else 'weight_decay'}": second}
            summary[f"{name}_loss"] = loss_of(results, search.best)
            summary[f"{name}_at_edge"] = int(search.at_edge)
    header = ["optimizer", "lr", "weight decay", "M tokens", "steps", "held-out loss", "chosen"]
    return "quality_search", {"summary": summary, "table": {"header": header, "rows": rows}}


def _shown(label: str, spec: Spec) -> str:
    """The label, with the sphere that was searched."""
    return f"{label} ({dict(spec.c3o)['c3o_sphere']:g})" if label.startswith(SPHERE) else label


def _loss(results: Results, spec: Spec) -> str:
    loss = loss_of(results, spec)
    return results[spec.key]["status"] if loss is None else f"{loss:.4f}"


def _size(study: Study, spec: Spec) -> list[str]:
    return [f"{spec.steps * study.tokens_per_step / 1e6:.1f}", f"{spec.steps}"]


def _finals(study: Study, items: list[Item], results: Results) -> tuple[str, dict[str, Any]]:
    losses = losses_of(items, results)
    noise = noise_of(losses, list(losses))
    payload = _against(study, items, results, losses, "adamw", noise)
    summary = payload["summary"]
    verdicts = []
    for name, prefix, words in (("c3o", "", "C3O"), (SPHERE, "sphere_", "C3O on a sphere")):
        shorter = difference(losses, f"{name}, shorter", "adamw")
        if not shorter:
            continue
        delta, whole = statistics.fmean(shorter), len(shorter) == len(study.seeds)
        summary |= {"shorter_share": SHORTER, f"{prefix}shorter_minus_adamw": delta}
        if whole:  # some of the seeds are no answer
            summary[f"{prefix}bar_met"] = int(delta <= 0)
        share = f"{words} with {SHORTER:g} of AdamW's tokens ends {delta:+.4f} nats from AdamW"
        seeds = ", ".join(f"{d:+.4f}" for d in shorter)
        met = "reached" if delta <= 0 else "not reached"
        met += "" if whole else f" on {len(shorter)} of {len(study.seeds)} seeds, the others not run"
        verdicts.append(f"{share}: {met} ({verdict(delta, noise)}; seeds {seeds})")
    if verdicts:
        payload["verdict"] = "; ".join(verdicts)
    if to_muon := difference(losses, "c3o", "muon"):
        summary["c3o_minus_muon"] = statistics.fmean(to_muon)
    return "quality_optimizers", payload


def _ablate(study: Study, items: list[Item], results: Results) -> tuple[str, dict[str, Any]]:
    losses = losses_of(items, results)
    return "quality_ablation", _against(study, items, results, losses, "base", noise_of(losses, list(losses)))


def _instant(study: Study, items: list[Item], results: Results) -> tuple[str, dict[str, Any]]:
    losses = losses_of(items, results)
    payload = _against(study, items, results, losses, "none", noise_of(losses, list(losses)))
    if delta := difference(losses, "coupled", "none"):
        payload["summary"]["coupled_may_be_default"] = int(statistics.fmean(delta) <= WITHIN)
    return "quality_instant", payload


def _storage(study: Study, items: list[Item], results: Results) -> tuple[str, dict[str, Any]]:
    losses = losses_of(items, results)
    first = items[0].label
    payload = _against(study, items, results, losses, first, noise_of(losses, list(losses)))
    whole = {label: difference(losses, label, first) for label in losses if label != first and mean(losses[label])}
    payload["summary"]["mean_within_0_002"] = sum(
        abs(statistics.fmean(d)) <= WITHIN_STORAGE for d in whole.values() if d
    )
    payload["summary"]["compared"] = sum(bool(d) for d in whole.values())
    # With seeds further apart than that, such a mean is no proof.
    payload["summary"]["noise_is_within_0_002"] = int((payload["summary"]["noise"] or 0.0) <= WITHIN_STORAGE)
    return "quality_storage", payload


def _against(
    study: Study, items: list[Item], results: Results, losses: Losses, against: str, noise: float | None
) -> dict[str, Any]:
    """Summary and table of every configuration beside one of them."""
    summary: dict[str, Any] = {"noise": noise}
    rows = []
    base = [results.get(item.spec.key) for item in items if item.label == against]
    of_base = sorted({str(r["commit"])[:8] for r in base if r is not None})
    for label, by_seed in losses.items():
        spec = next(item.spec for item in items if item.label == label)
        delta = difference(losses, label, against) if label != against else []
        middle = statistics.fmean(delta) if delta else None
        records = [results.get(item.spec.key) for item in items if item.label == label]
        of_label = [record for record in records if record is not None]
        commits = sorted({str(r["commit"])[:8] for r in of_label})
        # Speeds of other code say nothing beside the others.
        rates = [r["tokens_per_s"] for r in of_label if r.get("tokens_per_s") and commits == of_base]
        refused = sum(r.get("skipped_steps") or 0 for r in of_label)
        ended = [
            results[i.spec.key]["status"] if i.spec.key in results else "not run" for i in items if i.label == label
        ]
        each = [f"{loss:.4f}" if loss is not None else e for loss, e in zip(by_seed.values(), ended, strict=True)]
        rows.append([
            _shown(label, spec), f"{spec.lr:g}", f"{spec.weight_decay:g}", *_size(study, spec), " / ".join(each),
            _digits(mean(by_seed)), _digits(spread(by_seed)), _digits(middle, sign=True),
            _digits(noise), None if middle is None else verdict(middle, noise), refused,
            f"{statistics.median(rates):,.0f}" if rates else None, ", ".join(commits) or None,
        ])  # fmt: skip
        name = label.replace(", ", "_").replace(" + ", "_").replace(" ", "_").replace("-", "_")
        summary |= {f"{name}_loss": mean(by_seed), f"{name}_minus_{against.split(' ')[0]}": middle}
    header = [
        "runs", "lr", "weight decay", "M tokens", "steps", "held-out loss by seed", "mean", "spread",
        f"minus {against}", "noise", "verdict", "steps refused", "tokens/s", "runs' commit",
    ]  # fmt: skip
    return {"summary": summary, "table": {"header": header, "rows": rows}}


def _digits(value: float | None, *, sign: bool = False) -> str | None:
    if value is None:
        return None
    return f"{value:+.4f}" if sign else f"{value:.4f}"


_BUILDERS = {"search": _search, "finals": _finals, "ablate": _ablate, "instant": _instant, "storage": _storage}
