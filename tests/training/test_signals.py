"""StopRequest: the first signal is a request, the second Ctrl-C is an order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from eco_llm.training.outcome import Outcome
from eco_llm.training.signals import StopRequest

BOTH = [(signal.SIGINT, Outcome.INTERRUPTED), (signal.SIGTERM, Outcome.TERMINATED)]


def handlers() -> tuple[object, object]:
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize(("number", "outcome"), BOTH)
def test_one_signal_is_a_request(number: signal.Signals, outcome: Outcome) -> None:
    before = handlers()
    with StopRequest() as stop:
        assert stop.outcome is None
        signal.raise_signal(number)
        assert stop.outcome is outcome
    assert handlers() == before
    assert stop.outcome is outcome


def test_a_second_interrupt_interrupts() -> None:
    before = handlers()
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.outcome is Outcome.INTERRUPTED
    assert handlers() == before


def test_the_first_signal_names_the_outcome() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert stop.outcome is Outcome.INTERRUPTED
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stop.outcome is Outcome.TERMINATED


def test_an_interrupt_after_sigterm_interrupts() -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_come_back_after_an_exception() -> None:
    before = handlers()
    inside = before
    with contextlib.suppress(ZeroDivisionError), StopRequest():
        inside = handlers()
        raise ZeroDivisionError
    assert inside != before
    assert handlers() == before


def test_a_handler_that_was_set_outside_python(monkeypatch: pytest.MonkeyPatch) -> None:
    before = handlers()
    try:
        with StopRequest() as stop:
            stop._previous[signal.SIGTERM] = None  # what signal.signal returns for a handler from C
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before[1])  # type: ignore[arg-type]
    assert handlers() == before


def test_in_another_thread_there_is_no_handler() -> None:
    before = handlers()
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.extend([handlers() == before, stop.outcome])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, None]
    assert handlers() == before


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill cannot send these signals on Windows")
@pytest.mark.parametrize(("number", "outcome"), BOTH)
def test_a_signal_from_another_process(number: signal.Signals, outcome: Outcome) -> None:
    code = (
        "import sys, time\n"
        "from eco_llm.training.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while stop.outcome is None: time.sleep(0.01)\n"
        "    print('step finished', flush=True)\n"
        "sys.exit(stop.outcome)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, number)
        assert child.stdout.read() == "step finished\n"
    assert child.returncode == outcome
