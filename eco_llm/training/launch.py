"""From accepted settings to a finished run: every part is built here, in the order in which it can refuse.

The data, the device and the settings refuse before anything is written to a new run directory.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eco_llm.config import COUPLED_FORM, SigmaConfig, TrainConfig, flatten, to_dict
from eco_llm.data.loader import TokenLoader, evaluation_batches
from eco_llm.data.order import require_length
from eco_llm.data.prepare import prepare
from eco_llm.data.progress import make_progress
from eco_llm.data.shards import Manifest, PreparedData, open_prepared
from eco_llm.errors import UserError
from eco_llm.head_start import ready_triton
from eco_llm.instant.plan.search import choose
from eco_llm.model.serving import serving_kernels
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.optim.factory import build_optimizer
from eco_llm.optim.release import ReleasedUpdate
from eco_llm.optim.update import Update
from eco_llm.perf.device_counters import DeviceCounters, memory_stats
from eco_llm.perf.environment import collect as collect_environment
from eco_llm.perf.memory import CudaAllocator, Known, MemoryLedger, Snapshot, tensor_bytes
from eco_llm.perf.phases import PhaseTimer
from eco_llm.runtime import Runtime, torch_dtype
from eco_llm.training import checkpoint
from eco_llm.training.crash import write_crash_report
from eco_llm.training.evaluation import Validation, evaluate
from eco_llm.training.graph import CaptureError, GraphedStep, compiles_blocks, wants_graph
from eco_llm.training.hooks.base import Hook
from eco_llm.training.hooks.memory_report import MemoryReport
from eco_llm.training.hooks.metrics_file import MetricsFile
from eco_llm.training.hooks.perf_window import PerfFiles
from eco_llm.training.hooks.progress import ProgressDisplay
from eco_llm.training.hooks.tensorboard import TensorBoard
from eco_llm.training.outcome import NonFiniteLoss, Outcome, headline, is_compilation_failure, is_out_of_memory
from eco_llm.training.run_directory import RunDirectory
from eco_llm.training.sigma_trainer import SigmaTrainer
from eco_llm.training.step import Step, TrainStep
from eco_llm.training.trained import TrainedModel, continue_text, load, newest_good


def train(config: TrainConfig, command: Sequence[str], hooks: Sequence[Hook] = ()) -> Outcome:
    """Run `eco_train train` with settings that passed `validate`; show progress; return how it ended.

    Args:
        hooks: further observers, told after the run's own.

    Raises:
        UserError: the device, the corpus, the run directory or their combination does not allow it.
    """
    run = RunDirectory(Path(config.training.output_dir))
    runtime = Runtime.detect(config.runtime)
    start = run.check(_with_modes(config, config.model, runtime))
    triton = ready_triton(runtime.device)
    PhaseTimer(runtime.device, config.perf.perf_device_time_mode)  # refuses a clock the device does not have
    wants_graph(config, runtime)  # refuses a graph that the device cannot have
    if config.perf.memory_report != "off" and runtime.device.type != "cuda":
        raise UserError(
            f"--memory-report {config.perf.memory_report} reads a CUDA allocator; there is none on {runtime.device}"
        )

    def accept(manifest: Manifest) -> None:
        require_length(manifest.splits["train"].tokens, config.training.seq_len, "train")

    try:
        if start != "new":  # a second trainer must hear of the first before it prepares data, which may take long
            run.open()
        data = _stored_data(run, config) if start == "resume" else None
        if data is None:
            data = prepare(config.data, config.model.vocab_size, progress=make_progress(), accept=accept)
        shape = resolve_shape(config, data)
        config = _with_modes(config, shape, runtime)
        if start == "new":  # only now: a refusal by the data must leave no folder behind
            run.open()
        return _Launch(run, config, shape, runtime, data, command, hooks, triton).go()
    finally:
        run.close()


def _with_modes(config: TrainConfig, shape: SigmaConfig, runtime: Runtime) -> TrainConfig:
    """`--instant-mode auto` for this device and shape; what the plan is not for must not be taken for planned."""
    if config.instant.instant_mode != "auto":
        return config
    if runtime.device.type != "cuda":
        raise UserError(f"--instant-mode auto plans a CUDA GPU's memory; this run is on {runtime.device}: name a mode")
    kernels = serving_kernels(shape, runtime.device, runtime.compute_dtype)
    if kernels.name != "triton":
        raise UserError(f"--instant-mode auto plans the memory of the Triton kernels, and {kernels.why}: name a mode")
    return choose(config, model=shape, compute_bytes=runtime.compute_dtype.itemsize)


def _stored_data(run: RunDirectory, config: TrainConfig) -> PreparedData | None:
    """The tokens a run was trained on, if they are still there and the data flags are the same.

    So a run goes on after its corpus has changed (a `pip install` changes `python-env`), on what it began with.
    """
    began, now = run.saved_config().data, config.data
    resolved = run.saved()["resolved"]
    folder = Path(resolved["data_folder"])
    if dataclasses.replace(began, data_cache=now.data_cache) != now or not folder.is_dir():
        return None
    data = open_prepared(folder)
    return data if data.manifest.fingerprint() == resolved["data_fingerprint"] else None


def resolve_shape(config: TrainConfig, data: PreparedData) -> SigmaConfig:
    """The model's shape, its vocabulary made to fit a given tokenizer (rounded up to a multiple of 64)."""
    if config.data.tokenizer == "train":
        return config.model  # the tokenizer was trained to --vocab-size; a small corpus may leave rows unused
    return dataclasses.replace(config.model, vocab_size=-(-data.tokenizer.vocab_size // 64) * 64)


def _known(optimizers: Sequence[torch.optim.Optimizer]) -> Known:
    """Bytes of the optimizers' parameters, of their gradients, and of their state on the same device."""
    params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    values = [v for o in optimizers for of_one in o.state.values() for v in of_one.values()]
    state = [v for v in values if isinstance(v, torch.Tensor)]
    return Known(
        weights=tensor_bytes(params),
        gradients=tensor_bytes(p.grad for p in params if p.grad is not None),
        optimizer=tensor_bytes(v for v in state if v.device == params[0].device),
    )


class _Launch:
    """One training, from an open run directory to its outcome."""

    def __init__(
        self,
        run: RunDirectory,
        config: TrainConfig,
        shape: SigmaConfig,
        runtime: Runtime,
        data: PreparedData,
        command: Sequence[str],
        hooks: Sequence[Hook],
        triton: threading.Thread | None = None,
    ) -> None:
        self.further_hooks, self.triton = hooks, triton
        self.run, self.config, self.shape, self.data = run, config, shape, data
        self.command = list(command)
        self.graph = False
        self.ledger: MemoryLedger | None = None
        self.report: MemoryReport | None = None
        self.kernels = serving_kernels(shape, runtime.device, runtime.compute_dtype)
        self.runtime = dataclasses.replace(runtime, compile=compiles_blocks(config, shape, runtime))
        self.display = ProgressDisplay(config.training.log_interval)
        self.say = self.display.on_message

    def go(self) -> Outcome:
        start = self.run.check(self.config)  # again, now that nobody else can change it
        if start == "set aside":
            self.say(f"an earlier run was set aside in {self.run.set_aside()}")
        checkpoint.discard_partial(self.run.checkpoints)
        saved = newest_good(self.run, with_optimizer=True, say=self.say) if start == "resume" else None
        if saved is not None and saved.step >= self.config.training.steps:
            self.say(f"nothing to do: the run is at step {saved.step}; raise --steps to train on, or use --no-resume")
            self._triton_is_ready()
            self._sample(load(self.run, self.runtime))
            return Outcome.DONE
        try:
            trainer, hooks = self._build(saved)
        except Exception as error:
            if isinstance(error, UserError):
                raise
            return self._crashed(error, step=saved.step if saved else 0, last_record=None)
        begin = f"run directory: {self.run.path}"
        if saved is not None:
            begin = f"resuming after step {saved.step} of {self.config.training.steps}"
        del saved  # as large as the model and the optimizer's state
        return self._fit(trainer, hooks, begin)

    # -- building ------------------------------------------------------------------------------------------

    def _build(self, saved: checkpoint.Checkpoint | None) -> tuple[SigmaTrainer, list[Hook]]:
        t, runtime, data = self.config.training, self.runtime, self.data
        runtime.setup(t.seed)
        with torch.device(runtime.device):
            weights = torch_dtype(self.config.runtime.weights_dtype)
            self.model = SigmaLLM(self.shape, self.config.instant, weights_dtype=weights)
        groups = self.model.parameter_groups(self.config.optimizer.weight_decay)
        rule = (self.config.optimizer, self.config.c3o, runtime.device)
        update: Update | ReleasedUpdate
        if self.config.optimizer.gradient_release:
            update = ReleasedUpdate(groups, self.model.update_units(), *rule, guard=self.model.stack.guard)
        else:
            update = Update(build_optimizer(groups, *rule), self.config.optimizer)
        self.graph = wants_graph(self.config, runtime) and update.capturable
        on_cuda = runtime.device.type == "cuda"
        loader = TokenLoader(
            data, "train", batch_size=t.batch_size, seq_len=t.seq_len, seed=t.seed,
            rank=runtime.rank, world_size=runtime.world_size, pin_memory=on_cuda,
        )  # fmt: skip
        if runtime.compile:
            self.model.compile_blocks()

        held_out = data.tokens("val")  # opened once: what is open stays readable if someone clears the cache

        def validate() -> Validation:
            batches = evaluation_batches(
                held_out, batch_size=t.batch_size, seq_len=t.seq_len, max_batches=t.eval_batches, pin_memory=on_cuda
            )
            per_token = data.manifest.splits["val"].bytes_per_token
            return evaluate(self.model, batches, runtime, bytes_per_token=per_token)

        perf = self.config.perf
        timer = PhaseTimer(runtime.device, perf.perf_device_time_mode, perf.perf_sync_boundaries)
        self.counters = DeviceCounters(runtime.device)
        self._record_settings(saved)
        first_step = (saved.step if saved else 0) + 1
        moved = self.run.rewind_metrics(first_step - 1)
        if moved:
            self.say(f"{moved} logged steps after the checkpoint will be done again (kept: metrics.superseded.jsonl)")
        self.run.perf.mkdir(exist_ok=True)
        environment = collect_environment(str(runtime.device), self.command)
        if perf.memory_report != "off":
            self.ledger = MemoryLedger(CudaAllocator(runtime.device), lambda: _known(update.optimizers))
            self.report = MemoryReport(
                perf.memory_report, self.ledger, Snapshot(runtime.device), self.run.perf, environment, self.say
            )
        hooks: list[Hook] = [
            MetricsFile(self.run.metrics_file),
            TensorBoard(self.run.tensorboard, first_step),
            PerfFiles(
                perf, self.run.perf, timer, device=runtime.device,
                tokens_per_step=t.tokens_per_step,
                environment=environment, say=self.say, memory=self._memory, annotated=(self.model.stack,),
            ),
            *([self.report] if self.report is not None else []),
            self.display,
            *self.further_hooks,
        ]  # fmt: skip
        trainer = SigmaTrainer(
            training=t, optimizer=self.config.optimizer, runtime=runtime, model=self.model, update=update,
            loader=loader, timer=timer, step=self._make_step(update, loader, timer), validate=validate,
            checkpoints=self.run.checkpoints, hooks=hooks, probe=self._probe, resume_from=saved,
        )  # fmt: skip
        self.loader = loader
        return trainer, hooks

    def _make_step(self, update: Update | ReleasedUpdate, loader: TokenLoader, timer: PhaseTimer) -> Step:
        t = self.config.training
        observed = {} if self.report is None else {"at": self.report.at}
        step = TrainStep(self.model, update, loader, self.runtime, timer, t.grad_accum, **observed)
        if not self.graph:
            return step
        may_fall_back = self.config.runtime.cuda_graph == "auto"
        return GraphedStep(step, (t.batch_size, t.seq_len), fall_back=self._without_graph if may_fall_back else None)

    def _without_graph(self, why: Exception) -> None:
        """Capture failed; what was trained is as before, so the run may go on, but not in silence."""
        self.graph = False
        reason = headline(why)
        self.say(f"the step could not be captured in a CUDA graph and runs without, slower: {reason}")
        content = self.run.saved()
        content["resolved"] |= {"cuda_graph": False, "cuda_graph_failure": reason}
        if not self.runtime.compile and self.config.runtime.torch_compile == "auto":
            self.say("blocks are not compiled; --torch-compile makes steps without a graph faster")
        self.run.write_config(content)

    def _probe(self, step: int) -> dict[str, Any]:
        reading = self.counters.read()
        numbers: dict[str, Any] = {"gpu_util_percent": reading.gpu_util_percent}
        further = {"gpu_power_watts": reading.gpu_power_watts, "gpu_memory_used_gib": reading.gpu_memory_used_gib}
        numbers |= {name: value for name, value in further.items() if value is not None}
        t = self.config.training
        if step % t.log_interval == 0 or step == t.steps:  # the allocator's counters cost 0.1 ms to read
            numbers["memory_peak_gib"] = self._peak_gib()
        return numbers

    def _memory(self) -> dict[str, float | None]:
        """Peaks are the whole run's; the ledger starts the allocator's count anew in every step that it measures."""
        memory = memory_stats(self.runtime.device)
        peak = memory.get("gpu_memory_peak_gib")
        if self.ledger is not None and peak is not None:
            memory["gpu_memory_peak_gib"] = max(peak, self.ledger.highest / 2**30)
        return memory

    def _peak_gib(self) -> float | None:
        memory = self._memory()
        return memory.get("gpu_memory_peak_gib", memory["process_peak_rss_gib"])

    def _record_settings(self, saved: checkpoint.Checkpoint | None) -> None:
        """Write config.json, or add this resume to it."""
        manifest = self.data.manifest
        entry = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": self.command}
        if saved is not None:
            content = self.run.saved()
            if content["resolved"]["data_fingerprint"] != manifest.fingerprint():
                raise UserError(
                    f"{self.run.path}: the text of --data {' '.join(self.config.data.data)} has changed since this run"
                    " began; put it back to resume, or use --no-resume"
                )
            before, now = flatten(self.run.saved_config()), flatten(self.config)
            changed = {k: [before[k], now[k]] for k in now if before[k] != now[k]}
            content["resumed"] = [*content.get("resumed", []), {**entry, "step": saved.step, "changed": changed}]
            content["config"] = to_dict(self.config)
            if (was := content["resolved"].get("torch_compile")) not in (None, self.runtime.compile):
                kinds = {True: "compiled", False: "not compiled"}
                self.say(
                    f"blocks are {kinds[self.runtime.compile]} now, before they were {kinds[was]}: last bits of losses"
                    " may differ from what one run would have had"
                )
            content["resolved"] |= {**self._how(), "data_folder": str(self.data.path.resolve())}
            content["resolved"].pop("cuda_graph_failure", None)
            if "steps" in changed:
                self.say(
                    f"--steps {before['steps']} → {now['steps']}: the learning-rate schedule is that of the new length"
                )
        else:
            content = {
                "config": to_dict(self.config),
                "resolved": {
                    "vocab_size": self.shape.vocab_size,
                    "coupled_form": COUPLED_FORM,
                    "parameters": self.model.num_parameters(),
                    "flops_per_token": self.model.flops_per_token(self.config.training.seq_len),
                    **self._how(),
                    "data_fingerprint": manifest.fingerprint(),
                    "data_folder": str(self.data.path.resolve()),  # `evaluate` may be typed in another folder
                },
                "started": entry,
                "resumed": [],
            }
            self.data.tokenizer.save(self.run.tokenizer_file)
        self.run.write_config(content)

    def _how(self) -> dict[str, Any]:
        """What this process computes with; a resume may be on another machine."""
        return {
            "device": str(self.runtime.device),
            "compute_dtype": str(self.runtime.compute_dtype).removeprefix("torch."),
            "torch_compile": self.runtime.compile,
            "cuda_graph": self.graph,
            "kernels": self.kernels.name,
            "kernels_why": self.kernels.why,
            "torch": torch.__version__,
        }

    def _summary(self, begin: str) -> str:
        s, t = self.shape, self.config.training
        train = self.data.manifest.splits["train"]
        mixers = s.mixer_pattern
        what = (
            f"SigmaLLM {self.model.num_parameters() / 1e6:.1f}M parameters: {s.n_layers} blocks"
            f" ({mixers.count('mamba')} Mamba, {mixers.count('mla')} MLA), D {s.d_model}, V {s.vocab_size}"
        )
        how = (
            f"{self.runtime.device}, {str(self.runtime.compute_dtype).removeprefix('torch.')},"
            f" {self.kernels.name} kernels, {'compiled' if self.runtime.compile else 'not compiled'}"
            f"{', one CUDA graph' if self.graph else ''}"
            f"{', bf16 weights' if self.config.runtime.weights_dtype == 'bf16' else ''};"
            f" {self.config.optimizer.optimizer}{' inside backward' if self.config.optimizer.gradient_release else ''};"
            f" {t.batch_size} × {t.seq_len} tokens × {t.grad_accum} a step"
        )
        epochs = t.steps * t.tokens_per_step / train.tokens
        text = (
            f"data: {train.tokens:,} training tokens, {train.bytes_per_token:.2f} bytes/token;"
            f" the run is {epochs:.2f} epochs"
        )
        skips = self.data.manifest.skips
        if self.runtime.device.type == "cuda" and self.kernels.name != "triton":
            how += f"\nthe fused kernels do not serve this run, which will be several times slower: {self.kernels.why}"
        lines = [what, how, text, *([f"data skipped: {skips.summary()}"] if skips.total else []), begin]
        return "\n".join(lines)

    # -- running -------------------------------------------------------------------------------------------

    def _triton_is_ready(self) -> None:
        """Before the first kernel."""
        if self.triton is not None:
            self.triton.join()

    def _fit(self, trainer: SigmaTrainer, hooks: list[Hook], begin: str) -> Outcome:
        self.say(self._summary(begin))
        self._triton_is_ready()
        try:
            with self.counters, self.loader:
                outcome = trainer.fit()
        except NonFiniteLoss as error:
            self._report_crash(error, trainer.step, trainer.last_record)
            self.say(f"stopped: {error}")
            return Outcome.NOT_FINITE
        except Exception as error:
            return self._crashed(error, trainer.step + 1, trainer.last_record)
        if outcome is not Outcome.DONE:
            self.say(f"interrupted after step {trainer.step}; saved. The same command resumes")
            return outcome
        try:
            self._finish(trainer)
        except Exception as error:
            return self._crashed(error, trainer.step, trainer.last_record)
        return outcome

    def _finish(self, trainer: SigmaTrainer) -> None:
        peak = self._peak_gib()
        peak_text = f"; peak memory {peak:.2f} GiB" if peak is not None else ""
        skipped = f", {trainer.skipped_steps} skipped" if trainer.skipped_steps else ""
        self.say(f"done: {trainer.step} steps{skipped}{peak_text}; run directory {self.run.path}")
        self.model.eval()
        tokenizer, manifest = self.data.tokenizer, self.data.manifest
        self._sample(
            TrainedModel(
                self.model, tokenizer, self.config, self.runtime, trainer.step, manifest.fingerprint(), self.data.path
            )
        )

    def _sample(self, trained: TrainedModel) -> None:
        t = self.config.training
        if t.sample_tokens:
            self.say(f"--- sample, from {t.sample_prompt!r} ---")
            self.say(continue_text(trained, t.sample_prompt, t.sample_tokens, seed=t.seed))

    def _crashed(self, error: Exception, step: int, last_record: dict[str, Any] | None) -> Outcome:
        """Leave a crash report, say so, and choose the exit code."""
        path = self._report_crash(error, step, last_record)
        self.say(f"crashed in step {step}: {headline(error)}")
        if path is not None:
            self.say(f"crash report: {path}")
        if is_out_of_memory(error):
            self.say("out of memory: lower --batch-size (with --grad-accum to keep the tokens a step) or --seq-len")
            if self.graph:
                self.say("a CUDA graph keeps the step's memory to itself: --cuda-graph off leaves more for the rest")
            return Outcome.OUT_OF_MEMORY
        if "No space left on device" in str(error):
            self.say("the disk is full: free some space; the same command resumes")
        if self.runtime.compile and is_compilation_failure(error):
            self.say("compiling failed: use --no-torch-compile; `eco_train doctor` says what the compiler lacks")
        if isinstance(error, CaptureError):
            self.say("--cuda-graph off trains without a graph")
        return Outcome.CRASHED

    def _report_crash(self, error: Exception, step: int, last_record: dict[str, Any] | None) -> Path | None:
        """Write the crash report; where the disk takes none, the terminal gets the trace."""
        try:
            return write_crash_report(
                self.run.errors, error, step=step, last_record=last_record, config=to_dict(self.config)
            )
        except OSError as failure:
            traceback.print_exception(error)
            self.say(f"no crash report could be written: {failure}")
            return None
