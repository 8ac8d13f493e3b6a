"""A headless Chromium for tests, driven over a pipe: no package beside the browser itself.

`find()` gives its path or None; CONTRIBUTING says how to install one. The protocol is Chrome's DevTools protocol, with
`--remote-debugging-pipe`: JSON messages that end in a NUL byte, on the browser's file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage --hide-scrollbars"
    " --remote-debugging-pipe"
)


def find() -> str | None:
    """Path of a Chromium: $ECO_LLM_BROWSER, or one on the PATH. POSIX only: the pipe is two inherited descriptors."""
    if os.name != "posix":
        return None
    return os.environ.get("ECO_LLM_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One browser with one page. `complaints` holds what its console said and what it could not load."""

    def __init__(self, path: str) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()
        self._out, self._in = ours_out, ours_in

        def descriptors() -> None:
            # A pipe's own number may be 3 or 4, so both are moved out of the way first.
            a, b = os.dup2(to_browser, 101), os.dup2(from_browser, 102)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self._process = subprocess.Popen(
            [path, *_FLAGS.split(), f"--user-data-dir={self._folder.name}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=descriptors,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._next = 0
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self._session: str | None = None
        target = next(t for t in self._send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._folder.cleanup()

    # -- what tests do ---------------------------------------------------------------------------------------

    def view(self, width: int, height: int = 900, *, dark: bool = False, script: bool = True) -> None:
        """Set the page's size in CSS pixels, its colour scheme, and whether scripts run (from the next load on)."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])
        self._send("Emulation.setScriptExecutionDisabled", value=not script)

    def open(self, address: str) -> None:
        """Load a page and wait until it is there."""
        self._events.clear()
        self._send("Page.navigate", url=address)
        self._wait("Page.loadEventFired")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.1)

    def move_pointer(self, x: float, y: float) -> None:
        """Move the mouse, in CSS pixels from the window's corner."""
        self._send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path | None = None, *, whole: bool = False) -> bytes:
        """PNG of the window, or of the whole page."""
        size = self._send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        more = {"captureBeyondViewport": True, "clip": clip} if whole else {}
        image = base64.b64decode(self._send("Page.captureScreenshot", format="png", **more)["data"])
        if path is not None:
            path.write_bytes(image)
        return image

    def colours(self, image: bytes) -> dict[str, int]:
        """How many pixels of a PNG have each colour, the hundred commonest; counted by the browser itself."""
        data = base64.b64encode(image).decode()
        return dict(
            self.js(
                """(async () => {
                  const image = new Image();
                  image.src = "data:image/png;base64,DATA";
                  await image.decode();
                  const canvas = document.createElement("canvas");
                  canvas.width = image.width; canvas.height = image.height;
                  const context = canvas.getContext("2d");
                  context.drawImage(image, 0, 0);
                  const counts = new Map(), d = context.getImageData(0, 0, image.width, image.height).data;
                  for (let i = 0; i < d.length; i += 4) {
                    const key = `${d[i]},${d[i + 1]},${d[i + 2]}`;
                    counts.set(key, (counts.get(key) || 0) + 1);
                  }
                  return [...counts].sort((a, b) => b[1] - a[1]).slice(0, 100);
                })()""".replace("DATA", data)
            )
        )

    # -- the protocol ----------------------------------------------------------------------------------------

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def _wait(self, event: str) -> None:
        while not any(seen["method"] == event for seen in self._events):
            self._read()

    def _read(self, seconds: float = 60.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], seconds)
            assert ready, "the browser does not answer"
            new = os.read(self._in, 1 << 20)
            assert new, "the browser has died"
            self._buffer += new
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
            self._listen(message["method"], message["params"])
        return message

    def _listen(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"console: {params['args']}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {params['exceptionDetails']}")
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"log: {params['entry']['text']}")
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
            ("file:", "data:", "http://127.")
        ):
            self.complaints.append(f"network: {params['request']['url']}")
