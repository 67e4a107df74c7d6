"""A headless Chromium, driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol): JSON
messages, each ended by a zero byte, through the file descriptors 3 and 4, which --remote-debugging-pipe has it use."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Its sandbox needs namespaces that containers and root do not give; /dev/shm is small there. The pages are our own.
OPTIONS = ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars")
SECONDS = 60


class Browser:
    """One page of it, whose size and colours are set before each picture. requests: addresses that it asked for."""

    def __init__(self, profile: Path) -> None:
        assert FOUND
        self._socket, its = socket.socketpair()
        self._socket.settimeout(SECONDS)
        self._read, self._sent, self._session = b"", 0, {}
        self.requests: list[str] = []
        actions = [(os.POSIX_SPAWN_OPEN, output, os.devnull, os.O_WRONLY, 0) for output in (1, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, its.fileno(), number) for number in (3, 4)]
        command = [FOUND, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = os.posix_spawn(FOUND, command, os.environ, file_actions=actions)
        its.close()
        page = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]}
        for domain in ("Page", "Network"):
            self._call(f"{domain}.enable")

    def show(self, page: Path, width: int, scheme: str) -> None:
        """Load a file in a window of so many pixels, for a reader who prefers light or dark colours."""
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.requests.clear()
        self._call("Page.navigate", url=page.as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives, as JSON holds it."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def picture(self, file: Path) -> np.ndarray:
        """The whole page as a PNG, and its pixels: (height, width, 3 or 4), 0 to 1."""
        from matplotlib.image import imread

        png = base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)
        return imread(io.BytesIO(png), format="png")

    def close(self) -> None:
        self._session = {}
        self._call("Browser.close")
        self._socket.close()
        os.waitpid(self._process, 0)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters} | self._session
        self._socket.sendall(json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._sent:
            pass
        assert "result" in answer, answer
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            received = self._socket.recv(1 << 20)
            assert received, f"{FOUND} ended"
            self._read += received
        text, _, self._read = self._read.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message
