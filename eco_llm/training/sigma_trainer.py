"""The training loop.

One turn: fetch, forward, backward, update, clear (the core step, in `step.py`), then whatever is due: validation,
checkpoint. Numbers that live on the device reach the log some steps later; nothing here waits for them. What
happens to a step's numbers is the hooks' affair: the last thing in a turn, when the device has work again, and on the
next step's clock, so that nothing lies between two steps. What ends a run, the last validation and the last
checkpoint, comes after its last step and is in no step's time: a short run's rates would be those of scoring the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eco_llm.config import OptimizerConfig, TrainingConfig
from eco_llm.data.loader import TokenLoader
from eco_llm.model.sigma_llm import SigmaLLM
from eco_llm.optim.release import ReleasedUpdate
from eco_llm.optim.schedule import lr_at
from eco_llm.optim.update import Update
from eco_llm.perf.phases import PhaseTimer, StepTimes
from eco_llm.perf.window import rates
from eco_llm.runtime import Runtime
from eco_llm.training import checkpoint
from eco_llm.training.evaluation import Validation
from eco_llm.training.hooks.base import Hook
from eco_llm.training.outcome import NonFiniteLoss, Outcome
from eco_llm.training.scalars import AsyncScalars
from eco_llm.training.signals import StopRequest
from eco_llm.training.step import Step


class SigmaTrainer:
    """Trains one model in one process.

    Args:
        step: does the core of a turn.
        validate: scores the model; called every `eval_interval` steps and after the last one.
        checkpoints: folder for checkpoints.
        probe: further numbers for the record of a step (device counters); must be quick and never wait for the device.
        resume_from: the checkpoint to continue, or None to start at step 0.
    """

    def __init__(
        self,
        *,
        training: TrainingConfig,
        optimizer: OptimizerConfig,
        runtime: Runtime,
        model: SigmaLLM,
        update: Update | ReleasedUpdate,
        loader: TokenLoader,
        timer: PhaseTimer,
        step: Step,
        validate: Callable[[], Validation],
        checkpoints: Path,
        hooks: Sequence[Hook],
        probe: Callable[[int], dict[str, Any]] = lambda step: {},
        resume_from: checkpoint.Checkpoint | None = None,
    ) -> None:
        self._training, self._optimizer = training, optimizer
        self._model, self._update, self._loader, self._timer = model, update, loader, timer
        self._validate, self._checkpoints, self._hooks, self._probe = validate, checkpoints, hooks, probe
        self._step = step
        self._scalars = AsyncScalars(runtime.device)
        self._waiting: dict[int, dict[str, Any]] = {}  # step → what is known of its record so far
        self._saved_step: int | None = None
        self._bad_steps_in_a_row = 0
        self.skipped_steps = 0
        self.step = 0
        self.last_record: dict[str, Any] | None = None
        if resume_from is not None:
            self._restore(resume_from)

    # -- the loop ------------------------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train to the last step, or to a signal; save; return how it ended.

        Raises:
            NonFiniteLoss: `max_bad_steps` steps in a row could not be applied. The last regular checkpoints
                stay: the newest weights are the suspects.
            Exception: whatever broke a step, after the records that had arrived were written.
        """
        last = self._training.steps
        try:
            with StopRequest() as stop:
                for hook in self._hooks:
                    hook.on_start(self.step + 1, last)
                self._timer.begin_step(self.step + 1)
                while self.step < last and stop.outcome is None:
                    self._turn(self.step + 1)
                self._timer.discard_step()
                self._drain()
                self._review()
                self._announce(self._model.stack.unsaid())
                if self._saved_step != self.step:
                    self._save()
        except BaseException as error:
            # A dead device cannot be asked for the records under way, nor can every hook close on it; what is
            # reported is the error that came first, with the others as notes.
            try:
                self._drain()
            except Exception as lost:
                error.add_note(f"records under way were lost: {lost!r}")
            for failure in self._close_hooks():
                error.add_note(f"a hook failed to close: {failure!r}")
            raise
        if failures := self._close_hooks():
            raise failures[0]
        return stop.outcome or Outcome.DONE

    def _close_hooks(self) -> list[Exception]:
        """End every hook, whatever the others do; return what went wrong."""
        failures = []
        for hook in self._hooks:
            try:
                hook.on_end()
            except Exception as error:
                failures.append(error)
        return failures

    def _turn(self, step: int) -> None:
        """Do a step that the clock already counts as begun, and begin the next."""
        self._review()
        self._step.prepare()  # capturing, and compiling for it, are in the first step's time, and not in its core
        if self._is_save_due():  # here, so that the cost is inside a step and the step saved has its record written
            self._drain()
            self._save()
        for hook in self._hooks:
            hook.on_step(step)
        lr = lr_at(step - 1, config=self._optimizer, total_steps=self._training.steps)
        self._update.set_lr(lr)
        self._timer.mark_core_begin()
        output = self._step.run()
        self._timer.mark_core_end()
        self.step = step

        self._scalars.push(step, output.names, output.values)
        record = self._waiting[step] = {"step": step, "lr": lr, **self._model.stack.figures(), **self._probe(step)}
        if self._timer.annotate:
            record["traced"] = 1  # by a profiler, and slower for it
        is_last = step == self._training.steps
        if self._is_validation_due() and not is_last:
            record |= self._score()
        self._timer.end_step()
        for hook in self._hooks:
            hook.on_step_end(step)
        if self._is_validation_due() and is_last:
            record |= self._score()
        self._timer.begin_step(step + 1)
        self._deliver(self._timer.collect(), self._scalars.collect())

    def _score(self) -> dict[str, float]:
        result = self._validate()
        return {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}

    def _review(self) -> None:
        """What INSTANT decides between steps; before a save, so that the checkpoint knows of it."""
        if not self._model.stack.review_due(self.step):
            return
        self._drain()
        self._announce(self._step.review(self.step))

    def _announce(self, texts: list[str]) -> None:
        for text in texts:
            for hook in self._hooks:
                hook.on_message(f"step {self.step}: {text}")

    def _is_save_due(self) -> bool:
        return self.step != self._saved_step and self.step > 0 and self.step % self._training.save_interval == 0

    def _is_validation_due(self) -> bool:
        interval = self._training.eval_interval
        return interval > 0 and (self.step % interval == 0 or self.step == self._training.steps)

    # -- records -------------------------------------------------------------------------------------------

    def _deliver(self, times: list[StepTimes], scalars: list[tuple[int, dict[str, float]]]) -> None:
        """Complete records with what has arrived and hand them out in step order.

        Every step gets its times: the scalars let the device fall behind by fewer steps than the timer can hold.
        """
        for t in times:
            self._waiting[t.step] |= t.as_dict() | rates(t, self._training.tokens_per_step)
        for step, values in scalars:
            self._waiting[step] |= self._model.stack.observe(values)
        while self._waiting:
            record = next(iter(self._waiting.values()))
            if "loss" not in record or "step_time_s" not in record:
                break
            del self._waiting[record["step"]]
            self._emit(record)
        if self._bad_steps_in_a_row >= self._training.max_bad_steps:
            raise NonFiniteLoss(
                f"{self._bad_steps_in_a_row} steps in a row had a non-finite loss or gradient and were not applied."
                " Lower --lr, raise --warmup-steps, or look at the data; earlier checkpoints are intact"
            )

    def _emit(self, record: dict[str, Any]) -> None:
        applied = bool(record.pop("applied"))
        # A step that the gate refused, of a sound loss, is answered by a review.
        if not (record.pop("instant_tripped_blocks", 0) and math.isfinite(record["loss"])):
            self._bad_steps_in_a_row = 0 if applied else self._bad_steps_in_a_row + 1
        self.skipped_steps += not applied
        record["tokens"] = record["step"] * self._training.tokens_per_step
        record["skipped_steps"] = self.skipped_steps
        self.last_record = record
        for hook in self._hooks:
            hook.on_record(record)

    def _drain(self) -> None:
        """Wait for the device and deliver every record."""
        self._deliver(self._timer.flush(), self._scalars.flush())

    # -- state ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint of the current step, whose record must have been delivered."""
        checkpoint.save(
            self._checkpoints,
            self.step,
            model=self._model.state_dict(),
            optimizer=self._update.state_dict(),
            trainer={
                "loader": self._loader.state_dict(),
                "random": checkpoint.random_state(),
                "skipped_steps": self.skipped_steps,
                "instant": self._model.stack.state_dict(),
            },
            keep=self._training.keep_checkpoints,
        )
        self._saved_step = self.step
        for hook in self._hooks:
            hook.on_checkpoint(self.step)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        assert saved.optimizer is not None  # loaded with_optimizer
        self._model.load_state_dict(saved.model)
        self._update.load_state_dict(saved.optimizer)
        self._loader.load_state_dict(saved.trainer["loader"])
        checkpoint.set_random_state(saved.trainer["random"])
        self.skipped_steps = saved.trainer["skipped_steps"]
        if "instant" in saved.trainer:  # not in checkpoints of 0.1.0
            self._model.stack.load_state_dict(saved.trainer["instant"])
        self.step = self._saved_step = saved.step
