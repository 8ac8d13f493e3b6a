"""`eco_train watch`: the page over HTTP, on this machine only, new when a file is."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eco_llm.cli.main import main
from eco_llm.proof.watch import HOST, Server

Runs = Callable[..., list[Path]]


@pytest.fixture
def served(runs: Runs) -> Iterator[tuple[Path, int]]:
    """(a run, the port where it is shown)."""
    (run,) = runs("died")
    with Server(run, 0) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield run, int(server.address.rstrip("/").rpartition(":")[2])
        finally:
            server.stop()
            thread.join(10)


def get(port: int, path: str = "/", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        connection.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode("utf-8")
    finally:
        connection.close()


def test_the_page_is_rendered_anew_only_when_a_file_has_changed(served: tuple[Path, int]) -> None:
    run, port = served
    status, headers, page = get(port)
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert f'data-version="{headers["ETag"].replace(chr(34), "&#34;")}"' in page
    assert "connect-src &#39;self&#39;" in page or "connect-src 'self'" in page
    assert get(port, If_None_Match=headers["ETag"])[0] == 304
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps({"step": 31, "loss": 1.2345}) + "\n")
    status, newer, page = get(port, If_None_Match=headers["ETag"])
    assert (status, newer["ETag"] != headers["ETag"]) == (200, True)
    assert "1.2345" in page
    (run / "metrics.jsonl").unlink()
    assert "is missing" in get(port)[2]  # a run that is set aside while it is watched


def test_only_the_runs_evidence_is_served(served: tuple[Path, int]) -> None:
    run, port = served
    (run.parent / "secret.json").write_text("{}", encoding="utf-8")
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    crash = next((run / "errors").iterdir()).name
    for path in ("/metrics.jsonl", "/config.json", "/perf/window_10m_bottlenecks.json", f"/errors/{crash}"):
        status, headers, content = get(port, path)
        assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        assert content == (run / path[1:]).read_text(encoding="utf-8")
    for path in (
        "/../secret.json",
        "/%2e%2e/secret.json",
        "/notes.txt",
        "/perf",
        "//etc/passwd",
        "/errors/../config.json",
    ):
        assert get(port, path)[0] == 404


def test_links_of_the_page_are_served(served: tuple[Path, int]) -> None:
    from page_reader import Page

    _, port = served
    page = Page(get(port)[2])
    assert page.complaints == []
    links = {(a.attrs["href"] or "").partition("#")[0] for a in page.root.all("a")} - {""}
    assert len(links) >= 4
    assert {link: get(port, f"/{link}")[0] for link in links} == dict.fromkeys(links, 200)


def test_another_sites_name_for_this_machine_is_refused(served: tuple[Path, int]) -> None:
    _, port = served
    assert get(port, Host=f"evil.example:{port}")[0] == 403
    assert get(port, Host=f"localhost:{port}")[0] == 200
    assert get(port, Host="127.0.0.1")[0] == 200  # as browsers write port 80
    assert get(port, Host="evil.example")[0] == 403


def test_crash_reports_of_a_comparisons_sides_are_served_and_noticed(served: tuple[Path, int]) -> None:
    run, port = served
    before = get(port)[1]["ETag"]
    report = run / "perf" / "compare" / "a" / "errors" / "crash_20260101T000000.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps({"kind": "crash", "message": "a side's own"}), encoding="utf-8")
    status, headers, page = get(port)
    assert (status, headers["ETag"] != before) == (200, True)
    assert "crash_20260101T000000.json" in page
    assert get(port, f"/{report.relative_to(run).as_posix()}")[0] == 200


def test_it_listens_on_this_machine_only(served: tuple[Path, int]) -> None:
    _, port = served
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=5)  # this machine too, by an address nobody asked for


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "needs one run directory"),
        ("a b", "needs one run directory"),
        ("nowhere", "nowhere is not a directory"),
        (".", ". holds no run"),
        ("run --port 70000", "--port must be between 0 and 65535, got 70000"),
        ("run --port x", "--port: 'x' is not a whole number"),
    ],
)
def test_bad_input_is_one_line(
    runs: Runs, words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    runs("before")[0].rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_one_line(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    (run,) = runs("before")
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["watch", str(run), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"--port {port}: Address already in use; name another" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_it_quietly_though_a_browser_is_connected(runs: Runs) -> None:
    (run,) = runs("before")
    command = [sys.executable, "-m", "eco_llm", "watch", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    line = process.stdout.readline()
    port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
    with socket.create_connection((HOST, port), timeout=30) as idle:
        assert get(port)[0] == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        del idle
    assert (process.returncode, out, err) == (0, "", "")
