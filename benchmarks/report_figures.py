"""The figures that the report's author gives, and the words that set ours beside them.

Nothing here measures. Every sentence is put together from an entry's own numbers, and holds whichever way they fall:
what is said of a direction is read off an interval, what is said of a cause is a count or a time of both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# From PROOF_OF_EVOLUTION.md, 2026-02-17; percents are of throughput, seconds of a step.
AUTHOR: dict[str, float] = {
    "baseline_tokens_per_s": 152.1569,
    "short_window_tokens_per_s": 173.2904,
    "short_window_gain_percent": 13.889,
    "long_run_core_tokens_per_s": 166.7130,
    "long_run_core_gain_percent": 9.567,
    "compile_on_tokens_per_s": 180.7208,
    "compile_off_tokens_per_s": 198.2186,
    "compile_off_gain_percent": 9.6822,
    "compile_off_forward_s": -0.0881,
    "compile_off_backward_s": -0.9225,
    "inversion_iterations": 3.0,
    "core_step_s": 12.4253,
    "forward_s": 3.4357,
    "backward_s": 7.7993,
    "opt_step_s": 1.1885,
    "backward_percent": 89.19,
    "opt_step_percent": 10.78,
    "zero_grad_percent": 0.025,
}

HEADER = ["experiment", "author", "here", "what we saw", "why it differs"]
Entry = dict[str, Any]
Row = list[str]


def table(experiments: dict[str, Entry], *, on_gpu: bool) -> dict[str, Any]:
    """`header` and `rows` of the page: the author's figures in the report's order, with what was measured of each."""
    rows: list[Row] = []
    for what, author, name, tell in _ROWS:
        entry = experiments.get(name)
        if entry is None:
            rows.append([what, author, "–", "not run", ""])
        elif "undefined" in entry:
            rows.append([what, author, "–", entry["undefined"], ""])
        elif "failed" in entry:
            rows.append([what, author, "–", f"failed: {entry['failed']}", ""])
        elif not entry["gate"]["passed"]:
            rows.append([what, author, "–", f"gate red, no speed: {entry['gate']['said']}", ""])
        else:
            rows.append([what, author, *tell(entry, on_gpu)])
    return {"header": HEADER, "rows": rows}


# ---- pieces of sentences ---------------------------------------------------------------------------------------


def gain(summary: dict[str, Any]) -> str:
    """Throughput of B over A, with its interval."""
    low, high = (100 * (summary[key] - 1) for key in ("ratio_low", "ratio_high"))
    return f"{100 * (summary['ratio'] - 1):+.1f}% ({low:+.1f} to {high:+.1f})"


def verdict(summary: dict[str, Any], chosen: str) -> str:
    """How the interval of B's gain stands to the side that the author chose, "a" or "b"."""
    low, high = summary["ratio_low"], summary["ratio_high"]
    if low <= 1 <= high:
        return "No difference shown"
    return "For the author's choice" if (low > 1) == (chosen == "b") else "Against the author's choice"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if abs(seconds) < 0.1 else f"{1e3 * seconds:.0f} ms"


def change(before: float, after: float) -> str:
    return f"{ms(before)} → {ms(after)}"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%"


def bound(part: float, whole: float) -> str:
    """The throughput that would be gained if this part of a step cost nothing."""
    return f"{100 * part / (whole - part):+.1f}%" if whole > part else "any amount"


def _work(entry: Entry) -> str:
    a, b = (entry["facts"]["work"][key] for key in "ab")
    launched = "launches" if "launches" in a else "operators"
    name = {"launches": "launches", "operators": "operator calls"}[launched]
    return (
        f"counted in one step: {a['host_reads']:,} → {b['host_reads']:,} host reads,"
        f" {a[launched]:,} → {b[launched]:,} {name}"
    )


def _phases(entry: Entry, *names: str) -> str:
    a, b = entry["phases"]["a"], entry["phases"]["b"]
    return ", ".join(f"{name} {change(a[name], b[name])}" for name in names)


def _graphed(entry: Entry) -> bool:
    return "CUDA graph" in entry["a"] and "CUDA graph" in entry["b"]


# ---- rows: (here, what we saw, why it differs) -----------------------------------------------------------------


def _hot_path(entry: Entry, on_gpu: bool) -> Row:
    both, a, b = entry["comparison"], entry["phases"]["a"]["opt_step"], entry["phases"]["b"]["opt_step"]
    whole_a, whole_b = both["median_a"], both["median_b"]
    saw = (
        f"a step {change(whole_a, whole_b)}: opt_step {change(a, b)}, all else {change(whole_a - a, whole_b - b)};"
        f" {_work(entry)}"
    )
    if "graph" in entry["also"]:
        saw += f". As shipped, in one CUDA graph: {gain(entry['also']['graph'])}"
    why = (
        f"{verdict(both, 'b')}. opt_step was {share(a, whole_a)} of a step before, so that removing all of it would"
        f" give {bound(a, whole_a)}; it is {share(b, whole_b)} now, and in the author's step, after his fix,"
        f" {share(AUTHOR['opt_step_s'], AUTHOR['core_step_s'])}. Of the gain, the same loop over"
        f" {entry['facts']['parameters']} parameters without its reads has {gain(entry['also']['no_reads'])}; the rest"
        " is one parameter at a time against all at once"
    )
    if not on_gpu:
        why += ". On a CPU a read waits for no device"
    return [gain(both), saw, why]


def _hot_path_core(entry: Entry, on_gpu: bool) -> Row:
    core, both = entry["core"], entry["comparison"]
    outside = [both[f"median_{key}"] - core[f"median_{key}"] for key in "ab"]
    saw = f"the same windows by the phase timer, the core of a step alone: {change(core['median_a'], core['median_b'])}"
    why = (
        f"{verdict(core, 'b')}. The author sets a long run's core rate against a short window's effective one, of an"
        " earlier build; here both sides are of one process and the same windows, so this figure parts from the one"
        f" above only by what is outside the core: {change(*outside)} a step"
    )
    return [gain(core), saw, why]


def _compile(entry: Entry, on_gpu: bool) -> Row:
    both, first, a, b = entry["comparison"], entry["facts"]["first_step_s"], entry["phases"]["a"], entry["phases"]["b"]
    saw = (
        f"on → off: a step {change(both['median_a'], both['median_b'])}; {_phases(entry, 'forward', 'backward')};"
        f" the first step {first['a']:.1f} s compiled, {first['b']:.1f} s eager"
    )
    why = (
        f"{verdict(both, 'b')}. Off changes forward by {ms(b['forward'] - a['forward'])}, backward by"
        f" {ms(b['backward'] - a['backward'])} (the author's: {AUTHOR['compile_off_forward_s']} s and"
        f" {AUTHOR['compile_off_backward_s']} s); {_work(entry)}. "
        + (
            "Both sides replay one graph, so the difference is of kernels, not of launching them"
            if _graphed(entry)
            else "Launching is in the difference"
        )
        + "; the first step is not in it"
    )
    return [gain(both), saw, why]


def _trust_skip(entry: Entry, on_gpu: bool) -> Row:
    both, facts = entry["comparison"], entry["facts"]
    a, b = entry["phases"]["a"]["opt_step"], entry["phases"]["b"]["opt_step"]
    trusted = facts["skipped"] + facts["exact"]
    saw = f"{facts['skipped']:.0f} of {trusted:.0f} norms skipped in the last step; opt_step {change(a, b)}"
    why = (
        f"{verdict(both, 'a')}. opt_step is {share(a, both['median_a'])} of a step without the skip, so that removing"
        f" all of it would give {bound(a, both['median_a'])}; it changed by {ms(b - a)} of {ms(both['median_a'])}. The"
        " decision is a flag on the device, "
        + ("which kernels read to spare a pass" if on_gpu else "which on a CPU spares nothing: every norm is taken")
    )
    return [gain(both), saw, why]


def _chunk(entry: Entry, on_gpu: bool) -> Row:
    both, length = entry["comparison"], entry["facts"]["length"]
    saw = (
        f"T = {length}; 128 → 256: a step {change(both['median_a'], both['median_b'])};"
        f" {_phases(entry, 'forward', 'backward')}"
    )
    why = (
        f"{verdict(both, 'a')}. A sequence is {-(-length // 128)} chunks of 128 or {-(-length // 256)} of 256: fewer"
        " states to pass on, products over more neighbours within a chunk; which weighs more depends on the kernels"
        f" ({entry['b']})"
    )
    return [gain(both), saw, why]


def _inverted(facts: dict[str, Any]) -> str:
    blocks = facts.get("instant_inverted_blocks", 0)
    if not blocks:
        return f"none of {facts['mamba_blocks']} Mamba blocks contracts enough, all are recomputed"
    return (
        f"{facts['instant_inversion_iters']:.2f} iterations in {blocks:.0f} of {facts['mamba_blocks']} Mamba blocks,"
        f" residual {facts['residual']:.1e}, rows off by {facts['rows']:.1e},"
        f" gradients by {facts['gradient_error']:.1e}"
    )


def _evaluations(facts: dict[str, Any]) -> float:
    """Of sub-layers, two a block, by the inversions of one step."""
    return 2 * float(facts.get("instant_inverted_blocks", 0)) * float(facts.get("instant_inversion_iters", 0.0))


def _inversion(entry: Entry, on_gpu: bool) -> Row:
    facts, none, b = entry["facts"]["b"], entry["phases"]["none"], entry["phases"]["b"]
    extra = (b["backward"] - none["backward"]) / none["forward"]
    iterations = facts.get("instant_inversion_iters")
    left = facts["mamba_blocks"] - facts.get("instant_inverted_blocks", 0)
    saw = (
        f"tolerance 3e-3, after {entry['facts']['train_steps']} steps of training: {_inverted(facts)}; against keeping"
        f" everything, backward takes {extra:+.2f} forwards and a step"
        f" {100 * (entry['also']['none']['ratio'] - 1):+.0f}% time"
    )
    why = (
        "A count is what a probe finds between steps: the fewest iterations whose error is under half the tolerance."
        f" Blocks that need more than the limit are recomputed and are not in the average: here {left:.0f}. How far the"
        " author's model was trained, and when his iteration stopped, the report does not say"
    )
    return ["none inverted" if iterations is None else f"{iterations:.2f} iterations", saw, why]


def _tolerance(entry: Entry, on_gpu: bool) -> Row:
    both, a, b = entry["comparison"], entry["facts"]["a"], entry["facts"]["b"]
    blocks = [f"{facts.get('instant_inverted_blocks', 0):.0f}" for facts in (a, b)]
    saw = f"2e-3: {ms(both['median_a'])}, {_inverted(a)}. 3e-3: {ms(both['median_b'])}, {_inverted(b)}"
    if not _evaluations(a) and not _evaluations(b):
        return ["none inverted", saw, "Nothing is inverted on either side, so the tolerance decides nothing here"]
    why = (
        f"{verdict(both, 'b')}. Inversions evaluate {_evaluations(a):.0f} → {_evaluations(b):.0f} sub-layers a step."
        " The tolerance sets both how often a block is iterated and which blocks are inverted at all"
        f" ({' → '.join(blocks)}) rather than recomputed"
    )
    return [gain(both), saw, why]


def _int4(entry: Entry, on_gpu: bool) -> Row:
    both, probes, steps = entry["comparison"], entry["facts"]["probes"], entry["facts"]["steps"]
    interval, bits = entry["facts"]["interval"], entry["facts"]["bits"]
    extra = both["median_a"] - both["median_b"]
    saw = (
        f"{probes['a']} attempts in {steps['a']} steps → {probes['b']} in {steps['b']}: a step"
        f" {change(both['median_a'], both['median_b'])}; {bits['a']:g} → {bits['b']:g} bits in the end"
    )
    why = (
        f"{verdict(both, 'b')}. What the attempts of a step cost is {ms(extra)}, {share(extra, both['median_b'])} of a"
        " step without: the blocks once more on the last batch, the error of 4 bits measured, the host waiting for it."
        f" One attempt in {interval} steps is {share(extra / interval, both['median_b'])}"
    )
    return [gain(both), saw, why]


def _batch(entry: Entry, on_gpu: bool) -> Row:
    facts, gib = entry["facts"], 2**30
    small, large = facts["small"], facts["large"]
    free, other, capped, saved = (facts[key] for key in ("free_a", "free_b", "capped_a", "recomputed_b"))
    rate = capped["tokens_per_s"]
    saw = (
        f"peaks {free['peak_bytes'] / gib:.2f} and {other['peak_bytes'] / gib:.2f} GiB; under"
        f" {facts['cap_bytes'] / gib:.2f} GiB {small} runs at {rate:,.0f} tokens/s, {large} is out of memory"
    )
    why = (
        f"The cap is set between the two peaks, so {large} cannot fit; without it {large} gives"
        f" {100 * (other['tokens_per_s'] / free['tokens_per_s'] - 1):+.1f}% of the tokens/s. Under it, `recompute`: "
    )
    if "out_of_memory" in saved:
        why += f"{large} does not fit either"
    else:
        why += (
            f"{large} fits, {saved['peak_bytes'] / gib:.2f} GiB, at {saved['tokens_per_s']:,.0f} tokens/s"
            f" ({100 * (saved['tokens_per_s'] / rate - 1):+.1f}%)"
        )
    return [f"{small} fits, {large} does not", saw, why + ". One after the other, not in turns"]


def _breakdown(entry: Entry, on_gpu: bool) -> Row:
    percent, seconds = entry["facts"]["optimizer_phase"], entry["phases"]["a"]
    here = " / ".join(f"{percent[name]:.3g}%" for name in ("backward", "opt_step", "zero_grad"))
    saw = (
        ", ".join(f"{name} {ms(seconds[name])}" for name in ("forward", "backward", "opt_step", "zero_grad"))
        + f" over {entry['facts']['steps']} steps of {entry['a']}"
    )
    ours, his = (
        [part / whole for part in parts]
        for whole, parts in (
            (seconds["forward"], (seconds["backward"], seconds["opt_step"])),
            (AUTHOR["forward_s"], (AUTHOR["backward_s"], AUTHOR["opt_step_s"])),
        )
    )
    why = (
        f"backward takes {ours[0]:.2f} forwards here, where everything is kept, and {his[0]:.2f} in the author's long"
        f" run, which inverts; opt_step {ours[1]:.2f} and {his[1]:.2f}. "
        + (
            "A replayed step makes its gradients anew and has none to clear"
            if seconds["zero_grad"] == 0
            else "Gradients are dropped, not filled with zeros"
        )
        + ". The author's window stopped the device at phase boundaries (`--perf-sync-boundaries`), ours does not"
    )
    return [here, saw, why]


_ROWS: list[tuple[str, str, str, Callable[[Entry, bool], Row]]] = [
    ("per-parameter host reads → fused C3O, effective rate", "+13.889%", "hot_path", _hot_path),
    ("the same, core rate of a longer run", "+9.567%", "hot_path", _hot_path_core),
    ("torch.compile on → off", "+9.6822%", "compile", _compile),
    ("trust-norm skip off → on", "slower, no figure", "trust_skip", _trust_skip),
    ("Mamba chunk 128 → 256", "128 kept under T = 1024, no figure", "chunk", _chunk),
    ("reversible inversion", "≈ 3.0 iterations", "tolerance", _inversion),
    ("reversible tolerance 2e-3 → 3e-3", "relaxed, no figure", "tolerance", _tolerance),
    ("int4 tried in every step → sticky int8", "changed, no figure", "int4", _int4),
    ("batch 4 → 6", "6 out of memory, 4 kept", "batch", _batch),
    ("optimizer phase: backward / opt_step / zero_grad", "89.19% / 10.78% / 0.025%", "phases", _breakdown),
]
