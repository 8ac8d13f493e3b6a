from __future__ import annotations

import io

from eco_llm.config import DataConfig
from eco_llm.data.prepare import prepare
from eco_llm.data.progress import PlainProgress, RichProgress, make_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_display_suits_the_stream() -> None:
    assert isinstance(make_progress(io.StringIO()), PlainProgress)
    assert isinstance(make_progress(Terminal()), RichProgress)


def test_plain_lines_tell_the_phase_and_then_how_far_it_is() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every=0.0)
    progress.start("encoding", 4_000_000)
    progress.advance(1_000_000)
    progress.start("training", None)
    progress.advance(5)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "encoding: 4.0 MB …",
        "encoding: 1.0 MB of 4.0 MB (25%)",
        "training …",
        "training: 0.0 MB",
    ]


def test_plain_lines_are_not_written_too_often() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every=60.0)
    progress.start("encoding", 100)
    for _ in range(100):
        progress.advance(1)
    assert len(stream.getvalue().splitlines()) == 1


def test_preparing_shows_its_phases_and_every_byte(config: DataConfig) -> None:
    phases: dict[str, int] = {}

    class Recorder:
        closed = False

        def start(self, label: str, total: int | None) -> None:
            self.label, self.total = label, total
            phases[label] = 0

        def advance(self, amount: int) -> None:
            phases[self.label] += amount

        def close(self) -> None:
            self.closed = True

    recorder = Recorder()
    data = prepare(config, 300, progress=recorder)
    size = sum(s.text_bytes for s in data.manifest.splits.values())
    assert phases == {"reading the corpus": size, "training a tokenizer of 300": 0, "encoding": size}
    assert recorder.total == size
    assert recorder.closed


def test_a_bar_runs_through_on_a_terminal(config: DataConfig) -> None:
    stream = Terminal()
    progress = make_progress(stream)
    prepare(config, 300, progress=progress)
    progress.close()  # twice is allowed
    assert "encoding" in stream.getvalue()
    assert "100%" in stream.getvalue() or "kB" in stream.getvalue()
