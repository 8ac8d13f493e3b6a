"""Claim: memory against tokens a second of every memory mode, beside a plain PyTorch decoder's, at equal parameters.

    python benchmarks/instant_modes.py --peer PATH [--shapes 32x1024,4x8192]
    python benchmarks/instant_modes.py --peer PATH --cap-gib 8 --graph --rows "none@8x1024;auto@16x1024,24x1024;…"

PATH is a checkout of nanoGPT; its model as it is, compiled, fused AdamW, bf16 autocast, clipping. `recompute` wraps
each of its blocks in torch.utils.checkpoint; `chunked loss` makes its logits some thousand tokens at a time (peers.py):
what a careful user of it would write, and the stronger baseline where memory is short. Ours: the step that `eco_train`
runs in its default GPU profile: C3O on a sphere, weights and its state in bf16; without --graph with compiled blocks.

A row is a memory mode as `--instant-mode` takes it (`recompute`, `recompute*8,none*10`), perhaps followed by ` 4 bits`;
or `auto`, what `--instant-mode auto --vram-gib CAP` comes to; or a peer. `@16x1024,32x1024` behind it: at these shapes
only. Rows run as they are written, each a model of its own in one process; with --add those of the evidence file stay,
so that a row can have a process of its own: one that ran out of memory may leave some behind (`reserved_before_gib`).

Memory. Without --graph, as by default, steps are launched kernel by kernel, and peak is the most that live tensors held
in the steps that are timed: a graph's private pool keeps what it once allocated, so beside one that number says nothing
of a mode. With --graph ours is one CUDA graph, as `eco_train` runs it (the peer has none), and peak is, for every row,
the most since before its model was made, compiling, warm-up and capture with it. `reserved` is what the allocator took
from the device in the same time, which is what --cap-gib limits, by `torch.cuda.set_per_process_memory_fraction`: the
CUDA context is outside. A row that does not fit says so.

Modes that decide by probes are given one before they are timed. Gates: first losses within 5% of ln V, all finite;
all rows of the peer begin with the same loss (same weights, same batch), to 1e-3; a chunked loss and its gradient are
compared with the model's own before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, GateError, gpu_profile, hardware_slug, require_close, write_evidence
from render import SPOILED_GIB

from eco_llm.config import InstantConfig, RuntimeConfig, SigmaConfig, TrainConfig
from eco_llm.errors import UserError
from eco_llm.instant.plan.search import choose
from eco_llm.perf import environment
from eco_llm.runtime import set_cache_dirs

MODES = ("none", "recompute", "compress", "compress 4 bits", "fixed-point", "coupled")
PEERS = ("nanoGPT", "nanoGPT recompute", "nanoGPT chunked loss", "nanoGPT chunked loss recompute")
FOUR_BITS = " 4 bits"
PROFILE = gpu_profile()
C3O, WEIGHTS = PROFILE.c3o, PROFILE.runtime.weights_dtype
BF16 = WEIGHTS == "bf16"
STORAGE = {"weights": WEIGHTS, "c3o_state": C3O.c3o_state_dtype}


@dataclass(frozen=True)
class Row:
    """One measurement to make."""

    name: str
    """A memory mode or a peer, as it was written."""
    batch: int
    length: int

    @property
    def shape(self) -> str:
        """As `--shapes` has it."""
        return f"{self.batch}x{self.length}"

    @property
    def is_peer(self) -> bool:
        """Whether it is nanoGPT."""
        return self.name in PEERS

    def instant(self) -> InstantConfig:
        """What our step is given."""
        mode = self.name.removesuffix(FOUR_BITS)
        return InstantConfig(instant_mode=mode, instant_bits="4" if mode != self.name else "8")


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """(sequences, tokens) of `8x1024,1x8192`.

    Raises:
        UserError: not of this form.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", part):
            raise UserError(f"shape {part!r} is not sequences x tokens, as 8x1024")
    return [(int(batch), int(length)) for batch, length in (part.split("x") for part in parts)]


def parse_rows(text: str, shapes: str, mixers: tuple[str, ...], cap_gib: float) -> list[Row]:
    """The measurements that `--rows` and `--shapes` ask for, in the order in which they are written.

    Args:
        text: rows, semicolon between; each at `shapes` or at those behind its `@`.
        mixers: of the model's blocks; a mix of modes must be for as many.
        cap_gib: `auto` needs one.

    Raises:
        UserError: an unknown row, one for another number of blocks, `auto` without a cap, a row twice.
    """
    rows: list[Row] = []
    for part in text.split(";"):
        name, at, own = (piece.strip() for piece in part.partition("@"))
        found = [Row(name, *shape) for shape in parse_shapes(own if at else shapes)]
        if name.startswith("nanoGPT"):
            if name not in PEERS:
                raise UserError(f"--rows: {name!r} is not one of {', '.join(PEERS)}")
        elif name == "auto":
            if not cap_gib:
                raise UserError("--rows: auto needs --cap-gib, the memory to plan for")
        else:
            instant = found[0].instant()
            modes = instant.block_modes(mixers)
            if name.endswith(FOUR_BITS) and "compress" not in modes:
                raise UserError(f"--rows {name!r}: only compress has bits")
        rows += found
    if len(set(rows)) < len(rows):
        raise UserError("--rows: a row is there twice at one shape")
    return rows


def planned(shape: SigmaConfig, row: Row, cap_gib: float, *, graph: bool) -> InstantConfig:
    """What `--instant-mode auto --vram-gib CAP` comes to, other settings as a user finds them.

    Raises:
        UserError: nothing fits.
    """
    config = TrainConfig(model=shape, instant=InstantConfig(instant_mode="auto", vram_gib=cap_gib), c3o=C3O)
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, batch_size=row.batch, seq_len=row.length),
        runtime=dataclasses.replace(config.runtime, cuda_graph="auto" if graph else "off", weights_dtype=WEIGHTS),
    )
    return dataclasses.replace(choose(config).instant, instant_bits="8")


def evidence_name(name: str, cap_gib: float) -> str:
    """Of the evidence file: a run under a cap never replaces one without.

    Raises:
        UserError: a name that a file of evidence may not have.
    """
    own = name or (f"{cap_gib:g}gib".replace(".", "_") if cap_gib else "")
    if not re.fullmatch(r"[a-z0-9_-]*", own):
        raise UserError(f"--name {own!r}: use lower-case letters, digits, - and _")
    return "instant_modes" + (f"_{own}" if own else "")


def table(samples: Sequence[dict[str, Any]], cap_gib: float) -> dict[str, Any]:
    """The docs' table of what was measured: by length, then batch, then as it ran.

    Under a cap the fastest of ours and of the peers are in bold, for the cap asks for the fastest that fits, whatever
    the batch.
    """

    def length_and_batch(found: dict[str, Any]) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(found["shape"].split("x")))

    best = set(fastest(samples).values()) if cap_gib else set()

    def cells(found: dict[str, Any]) -> list[str]:
        name = found["row"] + (f": {found['modes']}" if "modes" in found else "")
        commit = (found.get("commit") or "")[:8]
        if "tokens_per_s" not in found:
            held = found.get("reserved_before_gib", 0.0)
            # What an earlier row of the same process left behind is not this row's to answer for.
            spoiled = cap_gib > 0 and held > SPOILED_GIB
            return [
                found["shape"],
                name,
                f"? ({held:.2f} GiB held before)" if spoiled else "does not fit",
                "",
                "",
                commit,
            ]
        speed = f"{found['tokens_per_s']:,.0f}"
        bold = (found["shape"], found["row"]) in best
        memory = [f"{found['peak_gib']:.2f}", f"{found['reserved_gib']:.2f}"]
        return [found["shape"], name, f"**{speed}**" if bold else speed, *memory, commit]

    return {
        "title": "memory modes" + (f", {cap_gib:g} GiB" if cap_gib else ""),
        "header": ["tokens a step", "mode", "tokens/s", "peak, GiB", "reserved, GiB", "row's commit"],
        "rows": [cells(found) for found in sorted(samples, key=length_and_batch)],
    }


def fastest(samples: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """{side and T: (shape, row)} of the most tokens a second on each side at each length."""
    best: dict[str, dict[str, Any]] = {}
    for found in samples:
        side = "peer" if found["row"] in PEERS else "ours"
        key = f"{side}_t{found['shape'].split('x')[1]}"
        if found.get("tokens_per_s", 0.0) > best.get(key, {}).get("tokens_per_s", 0.0):
            best[key] = found
    return {key: (found["shape"], found["row"]) for key, found in best.items()}


def main() -> None:
    """Measure, print, write the evidence."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of nanoGPT")
    parser.add_argument("--shapes", default="8x1024,32x1024,1x8192,4x8192", help="sequences × tokens, comma between")
    parser.add_argument("--rows", default=";".join((*MODES, *PEERS)), help="modes and peers, semicolon between")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--cap-gib", type=float, default=0.0, help="as on a smaller card; 0: none")
    parser.add_argument("--graph", action="store_true", help="ours as one CUDA graph, as eco_train runs it")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed for each row")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no row is begun")
    parser.add_argument("--name", default="", help="of the evidence file, after instant_modes; default: the cap")
    parser.add_argument("--add", action="store_true", help="keep the other rows of the evidence file")
    arguments = parser.parse_args()
    layers, width, vocab, heads = arguments.layers, arguments.width, arguments.vocab, arguments.width // 64
    shape = SigmaConfig(d_model=width, n_layers=layers, n_heads=heads, vocab_size=vocab)
    cap, graph = arguments.cap_gib, arguments.graph
    try:
        rows = parse_rows(arguments.rows, arguments.shapes, shape.mixer_pattern, cap)
        claim = evidence_name(arguments.name, cap)
        set_cache_dirs()

        import torch
        from peers import (
            PeerError,
            chunked_loss,
            describe,
            load_nanogpt,
            nanogpt_model,
            recompute_blocks,
            require_equal_loss,
        )
        from steps import Batches, Ours, clean, equal_mlp_width, quiet

        from eco_llm.runtime import Runtime
        from eco_llm.training.outcome import is_out_of_memory

        runtime = Runtime.detect(RuntimeConfig(device="cuda"))
        device = runtime.device
        total = torch.cuda.get_device_properties(device).total_memory
        if not 0 <= cap * 2**30 <= total:
            raise UserError(f"--cap-gib {cap:g}: the device has {total / 2**30:.1f} GiB")
        try:
            module = load_nanogpt(arguments.peer)
        except PeerError as error:
            raise UserError(str(error)) from None
    except UserError as error:
        sys.exit(_refused(error))
    torch.backends.cuda.matmul.allow_tf32 = True
    env = environment.collect(str(device))
    if cap:
        torch.cuda.set_per_process_memory_fraction(cap * 2**30 / total, device)

    def gpt(length: int) -> Any:
        with quiet():
            return nanogpt_model(
                module, block_size=length, vocab_size=vocab, n_layer=layers, n_head=heads, n_embd=width,
                dropout=0.0, bias=False,
            )  # fmt: skip

    with torch.device("meta"):
        parameters = gpt(1024).get_num_params()
    shape = dataclasses.replace(shape, mlp_hidden_dim=equal_mlp_width(shape, parameters))

    def peer(row: Row, batches: Batches) -> Any:
        torch.manual_seed(1337)
        with torch.device(device):
            model = gpt(row.length)
        with quiet():
            optimizer = model.configure_optimizers(1e-1, 1e-4, (0.9, 0.95), "cuda")
        if row.name.endswith("recompute"):
            recompute_blocks(model)
        source = batches.cycle()
        if "chunked loss" in row.name:
            some = batches.to_device(batches.cycle())
            with runtime.autocast():  # loss of 512 tokens and their gradient; bf16 sums in another order
                require_equal_loss(model, some.inputs[:1, :512], some.targets[:1, :512], loss=1e-3, gradient=1e-2)
            torch.cuda.empty_cache()
            call = chunked_loss(model)
        else:
            whole = torch.compile(model)

            def call(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                return whole(inputs, targets)[1]

        def step() -> torch.Tensor:
            inputs, targets = batches.to_device(source)
            with runtime.autocast():
                loss = call(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step, {}

    def ours(instant: InstantConfig, batches: Batches) -> Any:
        model = Ours(shape, batches.cycle(), runtime, graph=graph, instant=instant, c3o=C3O, bf16_weights=BF16)
        notes: dict[str, Any] = {"how": model.how}
        if instant.instant_mode == "fixed-point":
            for _ in range(60):  # at initialisation hardly a block contracts
                model.step()
            torch.cuda.synchronize()
            model.review(200)

        def step() -> torch.Tensor:
            loss = model.step()
            notes.update(model.model.stack.figures())
            return loss

        return step, notes

    def timed(step: Any) -> tuple[list[float], float]:
        """Seconds of a step, each the mean of a window at whose end alone the host waits; the last loss."""
        start = time.perf_counter()
        float(step())
        window = max(1, math.ceil(0.2 / (time.perf_counter() - start)))
        samples: list[float] = []
        end = time.perf_counter() + arguments.seconds
        while len(samples) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            for _ in range(window):
                loss = step()
            last = float(loss)
            samples.append((time.perf_counter() - start) / window)
        return samples, last

    sources: dict[str, Batches] = {}
    first_of_peer: dict[str, float] = {}

    def measure(row: Row) -> dict[str, Any]:
        """One row; out of memory is an answer, everything else that goes wrong an error."""
        if row.shape not in sources:
            sources[row.shape] = Batches(vocab, row.batch, row.length, device, count=2)
        clean(device)
        torch._dynamo.reset()
        before = torch.cuda.memory_allocated(device)
        held = torch.cuda.memory_reserved(device) / 2**30  # by what rows before it left; counts under the cap
        found: dict[str, Any] = {"shape": row.shape, "row": row.name, "reserved_before_gib": held}
        start = time.perf_counter()
        try:
            if row.is_peer:
                step, notes = peer(row, sources[row.shape])
            else:
                instant = row.instant()
                if row.name == "auto":
                    instant = planned(shape, row, cap, graph=graph)
                    found["modes"] = instant.instant_mode
                step, notes = ours(instant, sources[row.shape])
            first = float(step())
            step()
            torch.cuda.synchronize()
            found["ready_s"] = time.perf_counter() - start
            if not graph:
                torch.cuda.reset_peak_memory_stats(device)
            samples, last = timed(step)
            near = row.name == "fixed-point" or abs(first - math.log(vocab)) < 0.05 * math.log(vocab)
            if not (math.isfinite(last) and near):
                raise GateError(f"{row.shape} {row.name}: losses {first:.4f} … {last:.4f}")
            if row.is_peer:
                expected = first_of_peer.setdefault(row.shape, first)
                require_close(expected, first, relative=1e-3, what=f"first loss of {row.name} at {row.shape}")
            seconds = statistics.median(samples)
            found |= {
                "tokens_per_s": row.batch * row.length / seconds, "step_s": seconds, "windows_s": samples,
                "peak_gib": (torch.cuda.max_memory_allocated(device) - before) / 2**30,
                "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
                "first_loss": first, "last_loss": last, **notes,
            }  # fmt: skip
        except UserError as error:  # of `auto`: by the plan nothing fits
            found["refused"] = str(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found["out_of_memory"] = True
        return found | {"seconds": time.perf_counter() - start, "commit": env["commit"]}

    model = {"layers": layers, "width": width, "vocab": vocab, "mlp_hidden_dim": shape.mlp_hidden_dim}
    same = {"cap_gib": cap, "graph": graph, "model": model, "storage": STORAGE}
    measured: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    not_run_before: list[str] = []
    if arguments.add:
        try:
            path = RESULTS / hardware_slug(env) / f"{claim}.json"
            before, not_run_before = kept_rows(path, rows, same)
        except UserError as error:
            sys.exit(_refused(error))
    for sample in before:
        if sample["row"] in PEERS and "first_loss" in sample:
            first_of_peer[sample["shape"]] = sample["first_loss"]

    def write() -> None:
        """What ran so far, and what did not."""
        missed = [f"{row.name} {row.shape}" for row in rows[len(measured) :]]
        if missed:
            print(f"not run: {'; '.join(missed)}")
        if not measured:
            return
        best = {
            f"{key}_tokens_per_s": found["tokens_per_s"]
            for key, pair in fastest(before + measured).items()
            for found in before + measured
            if (found["shape"], found["row"]) == pair
        }
        payload = {
            "what": "tokens a second and peak memory of each memory mode", "unit": "tokens/s", **same,
            "peer": describe(arguments.peer, ["model.py"]), "parameters": parameters,
            "dtype": str(runtime.compute_dtype),
            "allocator": {k: os.environ.get(k) for k in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")},
            "table": table(before + measured, cap), "not_run": [*not_run_before, *missed],
            "seconds": time.perf_counter() - began, "summary": {"rows": len(before + measured), **best},
            "samples": before + measured,
        }  # fmt: skip
        print(write_evidence(claim, payload, device=str(device)))

    try:
        for row in rows:
            if time.perf_counter() - began > arguments.deadline:
                break
            measured.append(measure(row))
            print({k: v for k, v in measured[-1].items() if k != "windows_s"}, flush=True)
    finally:  # a red gate, too, leaves what was measured before it
        write()
    if not measured:
        sys.exit("instant_modes: error: --deadline had passed before the first row; nothing is written")


def kept_rows(path: Path, rows: Sequence[Row], same: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Of the evidence file, the samples, and the names of rows not run, that `rows` does not measure again.

    Raises:
        UserError: there is none, or one of other settings.
    """
    if not path.is_file():
        raise UserError(f"--add: there is no {path.name} to add to")
    found = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name, value in same.items() if found.get(name) != value]:
        raise UserError(f"--add: {path.name} was measured with another {' and '.join(other)}")
    again = {(row.shape, row.name) for row in rows}
    not_run = [name for name in found["not_run"] if name not in {f"{row.name} {row.shape}" for row in rows}]
    return [s for s in found["samples"] if (s["shape"], s["row"]) not in again], not_run


def _refused(error: UserError) -> int:
    print(f"instant_modes: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
