"""Debian's Chromium without a window, driven by its ChromeDriver over plain HTTP (the W3C WebDriver protocol)."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
KEYS = {"down": "\ue015", "tab": "\ue004", "enter": "\ue007", "right": "\ue014"}


class Page:
    """A tab. Every method raises urllib.error.HTTPError, whose text says why, for what Chromium refuses."""

    def __init__(self, base):
        self._base = base

    def call(self, path, **body):
        request = urllib.request.Request(
            f"{self._base}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address):
        self.call("url", url=str(address))

    def run(self, script, *arguments):
        """The value of a function body of JavaScript."""
        return self.call("execute/sync", script=script, args=arguments)

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, *keys):
        """Keys one after the other, where the focus is."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def devtools(self, command, **parameters):
        return self.call("goog/cdp/execute", cmd=command, params=parameters)

    def look(self, width=1280, height=900, dark=False):
        """The size of the window and the colours that its user prefers."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                      mobile=width < 600)  # fmt: skip
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", features=scheme)

    def console(self):
        """Messages of warnings and errors since the last call."""
        return [entry["message"] for entry in self.call("se/log", type="browser")]


@contextlib.contextmanager
def chromium():
    """A Page in a Chromium of its own that is gone afterwards."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        driver = subprocess.Popen([DRIVER, f"--port={port}"], env={**os.environ, "HOME": profile}, **quiet)
        try:
            base = f"http://localhost:{port}"
            _wait(base)
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}/profile"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = Page(base).call("session", capabilities={"alwaysMatch": wanted})["sessionId"]
            page = Page(f"{base}/session/{session}")
            try:
                yield page
            finally:
                with contextlib.suppress(urllib.error.URLError):
                    urllib.request.urlopen(urllib.request.Request(f"{base}/session/{session}", method="DELETE"))
        finally:
            driver.terminate()
            driver.wait()


def _wait(base):
    for _ in range(200):
        try:
            with urllib.request.urlopen(f"{base}/status", timeout=5) as answer:
                if json.load(answer)["value"]["ready"]:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.05)
    raise RuntimeError("ChromeDriver did not start")
