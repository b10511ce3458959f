"""Headless Chromium by the WebDriver protocol, which is JSON over HTTP: no library is needed for a page or two."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--autoplay-policy=no-user-gesture-required",
]


class Browser:
    """A window of one width. `run` executes the body of an async function in the page and returns what it returns."""

    def __init__(self, width: int, height: int = 900, scheme: str = "light", reduced_motion: bool = False) -> None:
        self.process = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if "started successfully on port" in line)
        self.base = f"http://127.0.0.1:{line.rstrip().rstrip('.').rsplit(' ', 1)[1]}/session"
        options = {"binary": CHROMIUM, "args": FLAGS}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/{session['sessionId']}"
        self._call("POST", "/timeouts", {"script": 120_000})
        self.resize(width, height)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        features += [{"name": "prefers-reduced-motion", "value": "reduce"}] if reduced_motion else []
        self._devtools("Emulation.setEmulatedMedia", features=features)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._devtools("Emulation.setDeviceMetricsOverride", **size)

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        whole = f"""const done = arguments[0];
        const wait = ms => new Promise(after => setTimeout(after, ms));
        const until = async holds => {{ for (let k = 0; k < 300 && !holds(); k++) await wait(50); }};
        (async () => {{ {script} }})().then(done, error => done({{ error: String(error.stack) }}));"""
        found = self._call("POST", "/execute/async", {"script": whole, "args": []})
        if isinstance(found, dict) and "error" in found:
            raise AssertionError(found["error"])
        return found

    def keys(self, text: str) -> None:
        """Presses keys where the focus is."""
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def _devtools(self, command: str, **parameters: Any) -> None:
        self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(50):
            request = urllib.request.Request(self.base + path, data, method=method)
            try:
                with urllib.request.urlopen(request, timeout=180) as answer:
                    return json.load(answer)["value"]
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode()[:2000]) from None
            except urllib.error.URLError:
                if attempt == 49:
                    raise
                time.sleep(0.1)
        raise AssertionError("not reached")
