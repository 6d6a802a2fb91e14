"""A headless Chromium that opens pages, spoken to through a pipe: no driver, and no network.

What it needs is installed by .ci/run: Chromium as CHROMIUM or on the path, and axe-core, the
accessibility checker, as the file that AXE_CORE names.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A4, as the print dialogue has it.
PAPER = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}


def chromium() -> str | None:
    """Return the browser's path; None if there is none."""
    own = os.environ.get("CHROMIUM")
    return own or next(filter(None, map(shutil.which, NAMES)), None)


def axe_core() -> str | None:
    """Return the script of axe-core; None if it is not installed."""
    path = os.environ.get("AXE_CORE", "")
    return Path(path).read_text(encoding="utf-8") if path and Path(path).is_file() else None


class Browser:
    """One browser with one tab; use it as a context manager.

    Attributes:
        errors: What the console has reported since the last ``open``: errors and warnings.
        requests: What has been requested since the last ``open``.
    """

    def __enter__(self) -> Browser:
        """Start the browser."""
        path = chromium()
        assert path is not None
        self.home = tempfile.TemporaryDirectory(prefix="sft-browser-", ignore_cleanup_errors=True)
        read_there, self._out = os.pipe()
        self._in, write_there = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self.home.name}", "about:blank"]

        def pipes() -> None:
            # The descriptors may be 3 and 4 themselves: copy them out of the way first.
            one, other = os.dup(read_there), os.dup(write_there)
            os.dup2(one, 3)
            os.dup2(other, 4)

        self._process = subprocess.Popen(
            [path, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=pipes,
        )
        os.close(read_there)
        os.close(write_there)
        self._number, self._rest, self._session = 0, b"", None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(item["targetId"] for item in pages if item["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self.home.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._in, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif message.get("method") == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(params["args"]))
        elif message.get("method") == "Page.loadEventFired":
            self._loaded = True
        return message

    def open(
        self, path: Path, width: int = 1280, *, dark: bool = False, script: bool = True
    ) -> None:
        """Open a file in a window of this width, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.errors, self.requests, self._loaded = [], [], False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._next()

    def evaluate(self, script: str) -> Any:
        """Run JavaScript in the page, and return what it (or its promise) results in."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def violations(self) -> list[str]:
        """Return what axe-core finds wrong with the page: rule, and the first elements."""
        source = axe_core()
        assert source is not None
        self.evaluate(source + ";0")
        found = self.evaluate(
            "axe.run().then(r => r.violations.map(v => v.id + ': ' + v.help + ': ' + "
            "v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(' | ')))"
        )
        return list(found)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def print(self, path: Path) -> None:
        """Write the page as it is printed, as a PDF."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", **PAPER)["data"]))
