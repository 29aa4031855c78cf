"""A headless Chromium, driven by its own protocol: no driver or framework between.

`ask` opens a page and runs steps on it; what it writes to the console and what it asks of a network
is kept.
"""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Coroutine
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--remote-debugging-port=0")  # fmt: skip
HAS_AXE = find_spec("axe_core_python") is not None


class Tab:
    """A page that is open. `problems`: errors of its console; `requests`: addresses it asked."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._count, self._session = socket, 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.is_loaded = False

    async def send(self, method: str, **params: Any) -> Any:
        """The result of a command of the protocol; events on the way are noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        await self._socket.send_json(message | self._of_session())
        while True:
            event = await self._next()
            if event.get("id") == self._count:
                if "error" in event:
                    raise RuntimeError(f"{method}: {event['error']}")
                return event["result"]

    def _of_session(self) -> dict[str, str]:
        return {"sessionId": self._session} if self._session else {}

    async def _next(self) -> dict[str, Any]:
        event = json.loads((await self._socket.receive(timeout=60)).data)
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(params["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.problems.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.problems.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Page.loadEventFired":
                self.is_loaded = True
        return event

    async def open(self, page: Path | str) -> None:
        """Open a file or an address in a tab of its own and wait until all of it is there."""
        target = await self.send("Target.createTarget", url="about:blank")
        attached = await self.send("Target.attachToTarget", flatten=True, **target)
        self._session = attached["sessionId"]
        for room in ("Runtime", "Log", "Network", "Page"):
            await self.send(f"{room}.enable")
        self.is_loaded = False
        address = page if isinstance(page, str) else page.absolute().as_uri()
        await self.send("Page.navigate", url=address)
        while not self.is_loaded:
            await self._next()

    async def run(self, script: str) -> Any:
        """The value of an expression of the page's script; a promise is waited for."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = await self.send("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def size(self, width: int, height: int = 800, is_dark: bool = False) -> None:
        """Set the size of the window, and whether the user wants it dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.send("Emulation.setDeviceMetricsOverride", **metrics)
        wanted = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[wanted])

    async def press(self, key: str) -> None:
        """Press and let go a key."""
        for kind in ("keyDown", "keyUp"):
            await self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    async def picture(self, out: Path, height: int, top: int = 0) -> None:
        """Save what is in the window as WebP."""
        width = await self.run("innerWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        shot = await self.send("Page.captureScreenshot", format="webp", quality=80, clip=clip,
                               captureBeyondViewport=True)  # fmt: skip
        out.write_bytes(base64.b64decode(shot["data"]))

    async def faults(self) -> list[dict[str, Any]]:
        """What axe finds of serious and critical faults."""
        await self.run(files("axe_core_python").joinpath("axe.min.js").read_text())
        found = await self.run("axe.run().then(result => JSON.stringify(result.violations))")
        return [
            {"rule": rule["id"], "where": [node["html"][:200] for node in rule["nodes"]]}
            for rule in json.loads(found)
            if rule["impact"] in ("serious", "critical")
        ]


def ask(page: Path | str, steps: Callable[[Tab], Coroutine[Any, Any, Any]]) -> Any:
    """What `steps` returns of a file, or an address, that Chromium has opened."""
    return asyncio.run(_ask(page, steps))


async def _ask(page: Path | str, steps: Callable[[Tab], Coroutine[Any, Any, Any]]) -> Any:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM or "chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
            try:
                assert browser.stderr
                lines = iter(browser.stderr.readline, "")
                addresses = (re.search(r"listening on (ws://\S+)", line) for line in lines)
                address = next(filter(None, addresses))[1]
                async with (
                    aiohttp.ClientSession() as session,
                    session.ws_connect(address, max_msg_size=0) as socket,
                ):
                    tab = Tab(socket)
                    await tab.open(page)
                    return await steps(tab)
            finally:
                browser.terminate()
                browser.stderr.close()
