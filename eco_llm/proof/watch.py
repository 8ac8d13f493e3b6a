"""`eco_train watch`: one run's report over HTTP, on this machine only, rendered anew when its files have changed."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from eco_llm.errors import UserError
from eco_llm.proof.report import document_of, html
from eco_llm.proof.report.evidence import METRICS, WRITTEN_BY, Run, crash_reports, open_runs
from eco_llm.proof.report.links import relative_to

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")  # a page elsewhere whose name resolves to us must not read a run
_MOST_SENT = 32 * 2**20


class LivePage:
    """The page, and the version of what it shows. Safe to be asked by several threads."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._link = relative_to(run.path)
        self._lock = threading.Lock()
        self._version, self._content = "", b""

    def get(self) -> tuple[str, bytes]:
        """(version, HTML); read and rendered only when a file has changed since."""
        with self._lock:
            version = self._now()
            if version != self._version:
                self.run.refresh()
                page = html.render(document_of([self.run]), self._link, live=version)
                self._version, self._content = version, page.encode("utf-8")
            return self._version, self._content

    def _now(self) -> str:
        """A digest of names, sizes and times of change of all evidence."""
        digest = hashlib.sha256()
        names = (*WRITTEN_BY, "metrics.superseded.jsonl")
        for path in [*(self.run.path / name for name in names), *crash_reports(self.run.path)]:
            try:
                stat = path.stat()
            except OSError:
                continue
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="backslashreplace"))
        return f'"{digest.hexdigest()[:24]}"'


class Server:
    """Serves one run's page and the evidence it links to; a context manager that gives the port back.

    Raises:
        UserError: no run there, or the port is taken.
    """

    def __init__(self, run: Path, port: int) -> None:
        page = LivePage(open_runs([run])[0])

        class Handler(_Handler):
            live_page = page

        try:
            self._http = _HttpServer((HOST, port), Handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; name another, or 0 for any free one") from None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.server_close()

    @property
    def address(self) -> str:
        """What to type into a browser."""
        return f"http://{HOST}:{self._http.server_address[1]}/"

    def serve(self) -> None:
        """Answer until `stop`, or a Ctrl-C, which is how a person ends it and no error."""
        with contextlib.suppress(KeyboardInterrupt):
            self._http.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """End `serve`, from another thread."""
        self._http.shutdown()


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True  # an open connection must not keep the program alive
    allow_reuse_address = False  # on Windows it would let two servers share a port

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has left is no news."""


class _Handler(BaseHTTPRequestHandler):
    live_page: LivePage
    server_version = "eco_train"
    timeout = 30

    def do_GET(self) -> None:
        """The page at `/`; evidence of the run under its own name; nothing else."""
        if re.sub(r":\d*$", "", self.headers.get("Host", "")) not in _NAMES:  # browsers leave out :80
            self._send(HTTPStatus.FORBIDDEN, b"this page is for this machine only\n", "text/plain")
            return
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            self._page()
        elif (file := self._evidence(path.removeprefix("/"))) is not None:
            self._file(file)
        else:
            self._send(HTTPStatus.NOT_FOUND, b"not found\n", "text/plain")

    def _page(self) -> None:
        version, content = self.live_page.get()
        if self.headers.get("If-None-Match") == version:
            self._send(HTTPStatus.NOT_MODIFIED, b"", "text/html", version)
        else:
            self._send(HTTPStatus.OK, content, "text/html", version)

    def _evidence(self, name: str) -> Path | None:
        """A file by its name in the run, from a closed list: no path that a request made up is ever opened."""
        run = self.live_page.run
        known = {
            *WRITTEN_BY,
            METRICS,
            "metrics.superseded.jsonl",
            *(file.path.relative_to(run.path).as_posix() for file in run.crashes),
        }
        return run.path / name if name in known else None

    def _file(self, path: Path) -> None:
        try:
            with path.open("rb") as f:
                content = f.read(_MOST_SENT)
        except OSError:
            self._send(HTTPStatus.NOT_FOUND, b"not found\n", "text/plain")
            return
        self._send(HTTPStatus.OK, content, "text/plain")

    def _send(self, status: HTTPStatus, content: bytes, kind: str, version: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        if version:
            self.send_header("ETag", version)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: a line for every refresh would bury the address."""
