"""A real headless Chromium for tests, driven through its DevTools protocol over two pipes.

No package is needed: messages are JSON, each ended by a NUL byte, on descriptor 3 (to the browser)
and 4 (from it). Nothing can be fetched from outside: names do not resolve.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 30.0
FLAGS = [
    *("--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--mute-audio"),
    *("--disable-extensions", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-default-apps", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--no-proxy-server", "--force-color-profile=srgb"),
]


def find() -> str | None:
    """The first browser of `NAMES` on PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A running browser."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._unread = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._send(message, session)
        while True:
            answer = self._receive(SECONDS)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def events(self, session: str) -> list[dict[str, Any]]:
        """What the browser told of a page so far."""
        return [event for event in self._events if event.get("sessionId") == session]

    def _send(self, message: dict[str, Any], session: str | None) -> None:
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]

    def _receive(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            if not ready or not (data := os.read(self._back, 1 << 20)):
                raise TimeoutError("the browser does not answer")
            self._unread += data
        raw, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        return message


class Page:
    """A tab with one file in it.

    Args:
        width, height: of the window in CSS pixels.
        phone: a touch screen, whose layout follows the meta tag of the page.
        dark: whether the person prefers dark colours.
        scripts: whether scripts run.
    """

    def __init__(
        self,
        browser: Chromium,
        path: Path,
        *,
        width: int = 1280,
        height: int = 900,
        phone: bool = False,
        dark: bool = False,
        scripts: bool = True,
        fragment: str = "",
    ) -> None:
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        if not scripts:
            self.call("Emulation.setScriptExecutionDisabled", value=True)
        self.address = path.resolve().as_uri() + fragment
        self.call("Page.navigate", url=self.address)
        self.wait_for_event("Page.loadEventFired")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def wait_for_event(self, method: str) -> None:
        end = time.monotonic() + SECONDS
        while not any(event["method"] == method for event in self._browser.events(self._session)):
            if time.monotonic() > end:
                raise TimeoutError(f"no {method}")
            time.sleep(0.02)
            self.call("Page.getFrameTree")  # takes in what has arrived

    def run(self, script: str) -> Any:
        """The value of an expression, promises awaited."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:500])
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """One key, as a person presses it."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and what the policy refused."""
        self.call("Page.getFrameTree")
        found = []
        for event in self._browser.events(self._session):
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"])[:300])
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] != "verbose":
                found.append(params["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(json.dumps(params["args"])[:300])
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for, without those of data in the page itself."""
        self.call("Page.getFrameTree")
        asked = (
            event["params"]["request"]["url"]
            for event in self._browser.events(self._session)
            if event["method"] == "Network.requestWillBeSent"
        )
        return [url for url in asked if not url.startswith("data:")]

    def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of the window, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page printed on the paper that its own style asks for."""
        found = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(found["data"])

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


@contextmanager
def started(command: str, folder: Path) -> Iterator[Chromium]:
    """A browser with its profile in `folder`, ended when the block is left."""
    flags = [*FLAGS, f"--user-data-dir={folder}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    (its_in, to), (back, its_out) = os.pipe(), os.pipe()
    # out of the way of 3 and 4, which become theirs in the new process
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (its_in, its_out)]

    def give() -> None:
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    process = subprocess.Popen(
        [command, *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=give,
    )
    for fd in (its_in, its_out, *theirs):
        os.close(fd)
    try:
        yield Chromium(process, to, back)
    finally:
        with suppress(OSError):
            os.write(to, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to)
        os.close(back)
