"""A run directory: the only interface between training and everything that reads runs. Torch-free.

config.json      settings, what they resolved to, and each later resume
metrics.jsonl    one line a step
checkpoints/     see training/checkpoint.py
errors/          crash reports
perf/ tb/        measured windows; TensorBoard events
previous/        earlier runs that --no-resume set aside, whole
.lock            held while a trainer works here; the system drops it when the process dies
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from eco_llm.config import COUPLED_FORM, TrainConfig, differences, flag_of, from_dict
from eco_llm.errors import UserError
from eco_llm.files import fsync_dir, replacing, write_json
from eco_llm.locks import lock_folder

FORMAT = 1
_OURS = (
    "config.json",
    "tokenizer.json",
    "metrics.jsonl",
    "metrics.superseded.jsonl",
    "checkpoints",
    "errors",
    "perf",
    "tb",
    "report.html",
    "PROOF_OF_EVOLUTION.md",
)
_KEPT_IN_PLACE = ("previous", ".lock")


@dataclass
class RunDirectory:
    """Paths and state of one run."""

    path: Path
    _lock: FileLock | None = field(default=None, repr=False)

    @property
    def config_file(self) -> Path:
        """Settings of the run."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, so that a run can be used where its data is not."""
        return self.path / "tokenizer.json"

    @property
    def errors(self) -> Path:
        """Folder of crash reports."""
        return self.path / "errors"

    @property
    def perf(self) -> Path:
        """Folder of measured windows."""
        return self.path / "perf"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard event files."""
        return self.path / "tb"

    def check(self, config: TrainConfig) -> Literal["new", "resume", "set aside"]:
        """Decide, writing nothing, what starting `config` here would do.

        Raises:
            UserError: the place cannot be written, holds something that is no run, or holds a run with other
                settings.
        """
        try:
            self._check_writable()
            present = self._content()
        except OSError as error:  # a name too long, a folder that may not be listed
            raise UserError(f"--output-dir {self.path}: {error.strerror}") from None
        if present <= {"perf"}:  # nothing, or what a sweep or a comparison measured here
            return "new"
        if "config.json" not in present:
            if present <= set(_OURS):
                return "set aside"  # a crash before the settings were saved
            raise UserError(
                f"--output-dir {self.path} is not empty and holds no run (no config.json); name another folder"
            )
        if not config.training.resume:
            if not present <= set(_OURS):
                self.saved()  # somebody else's config.json must not be moved
            return "set aside"
        content = self.saved()
        earlier = self._config_in(content)
        changed = differences(earlier, config)
        network_gone = _of_earlier_network(earlier, content)
        if (changed or network_gone) and next(self.checkpoints.glob("step_*"), None) is None:
            return "set aside"  # it died before it had saved anything: out of memory, say, and is tried again smaller
        if network_gone:
            raise self._network_gone()
        if changed:
            shown = ", ".join(_change(k, old, new) for k, (old, new) in list(changed.items())[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{self.path} holds a run with other settings ({shown}{more});"
                " give its settings to go on, use --no-resume to set it aside, or another --output-dir"
            )
        return "resume"

    def _content(self) -> set[str]:
        """Names here, without what stays when a run is set aside and what a crash in `files.replacing` leaves."""
        if not self.path.exists():
            return set()
        names = {p.name for p in self.path.iterdir()}
        return {n for n in names if n not in _KEPT_IN_PLACE and not n.startswith(".tmp-")}

    def _check_writable(self) -> None:
        place = self.path
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise UserError(f"--output-dir {self.path}: {place} is not a directory")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"--output-dir {self.path}: no permission to write in {place}")

    def open(self) -> None:
        """Create the folder and take its lock.

        Raises:
            UserError: another trainer works here, or the folder cannot be made.
        """
        in_use = "another eco_train; wait for it or name another folder"
        self._lock = lock_folder(self.path, output_dir=self.path, in_use=in_use)

    def close(self) -> None:
        """Drop the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def set_aside(self) -> Path:
        """Move an earlier run, whole, to `previous/NNN`; return where it went."""
        shelf = self.path / "previous"
        shelf.mkdir(exist_ok=True)
        taken = [int(p.name) for p in shelf.iterdir() if p.name.isdecimal()]
        target = shelf / f"{max(taken, default=0) + 1:03d}"
        target.mkdir()
        # The settings go last: until then a crash here still leaves a directory that is recognised as a run.
        for name in sorted(_OURS, key=lambda n: n == "config.json"):
            if (self.path / name).exists():
                (self.path / name).rename(target / name)
        fsync_dir(self.path)
        return target

    def saved(self) -> dict[str, Any]:
        """Content of config.json.

        Raises:
            UserError: there is no run here, or the file is damaged.
        """
        try:
            content = json.loads(self.config_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no run (no config.json)") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.config_file} cannot be read: {error}") from None
        if (
            not isinstance(content, dict)
            or content.get("format") != FORMAT
            or not isinstance(content.get("config"), dict)
        ):
            raise UserError(f"{self.config_file} is not a run's settings of format {FORMAT}")
        return content

    def saved_config(self) -> TrainConfig:
        """The settings this run was started with.

        Raises:
            UserError: there are none, they are damaged, or the run is of a network that this version does not have.
        """
        content = self.saved()
        config = self._config_in(content)
        if _of_earlier_network(config, content):
            raise self._network_gone()
        return config

    def _config_in(self, content: dict[str, Any]) -> TrainConfig:
        return from_dict(content["config"], source=str(self.config_file))

    def _network_gone(self) -> UserError:
        return UserError(
            f"{self.path} holds a run of --instant-mode coupled as an earlier version had it, another network than"
            " this version's; use that version for it, or train it anew (`eco_train train` with --no-resume or another"
            " --output-dir)"
        )

    def write_config(self, content: dict[str, Any]) -> None:
        """Replace config.json atomically."""
        write_json(self.config_file, {"format": FORMAT, **content})

    def rewind_metrics(self, step: int) -> int:
        """Move metric lines after `step` to metrics.superseded.jsonl; return how many were moved.

        After a crash the log may be ahead of the newest checkpoint. Those steps will be done again, so their
        lines leave the log, but are kept. A line that holds no step, such as a last one cut off by the crash, is moved
        too. Lines that stay keep their bytes; one that lost only its line end gets it back, or the next would join it.
        """
        if not self.metrics_file.exists():
            return 0
        keep: list[bytes] = []
        move: list[bytes] = []
        log = self.metrics_file.read_bytes()  # bytes: a power cut may leave what is no UTF-8
        for line in log.splitlines(keepends=True):
            (keep if _step_of_line(line) <= step else move).append(line)
        if move:
            superseded = self.path / "metrics.superseded.jsonl"
            torn = superseded.exists() and not superseded.read_bytes().endswith(b"\n")  # a crash in this very place
            with superseded.open("ab") as f:
                f.write(b"\n" * torn + _whole_lines(move))
                f.flush()
                os.fsync(f.fileno())
            fsync_dir(self.path)
        kept = _whole_lines(keep)
        if kept != log:
            with replacing(self.metrics_file) as temporary:
                temporary.write_bytes(kept)
        return len(move)


def _of_earlier_network(config: TrainConfig, content: dict[str, Any]) -> bool:
    """Whether a run's settings and config.json are of the coupled form as an earlier version had it."""
    return config.instant.coupled and (content.get("resolved") or {}).get("coupled_form") != COUPLED_FORM


def _change(name: str, old: Any, new: Any) -> str:
    """A setting's two values as flags are typed."""
    if isinstance(old, bool) and isinstance(new, bool):
        return " → ".join(flag_of(name if value else f"no_{name}") for value in (old, new))
    return f"{flag_of(name)} {old} → {new}"


def _whole_lines(lines: list[bytes]) -> bytes:
    joined = b"".join(lines)
    return joined if joined.endswith(b"\n") or not joined else joined + b"\n"


def _step_of_line(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")
