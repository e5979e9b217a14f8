"""A breakpoint in an exercise stops the run of a single check, under the debugger that VS Code uses."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devtools.workspace import Workspace
from selftest import toys as toy

LINE = toy.ANSWER.splitlines().index("    return 2 * x") + 1


class Debugger:
    """A client of the Debug Adapter Protocol: what VS Code does when somebody presses Debug."""

    def __init__(self, port: int) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
                break
            except OSError:
                assert time.monotonic() < deadline, "the debugger does not listen"
                time.sleep(0.05)
        self._stream = self._socket.makefile("rwb")
        self._number = 0

    def send(self, command: str, **arguments: object) -> None:
        """Sends a request."""
        self._number += 1
        request = {"seq": self._number, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(request).encode()
        self._stream.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self._stream.flush()

    def until(self, kind: str) -> dict[str, Any]:
        """Reads up to an event, or up to the response to a command, and returns its body."""
        while True:
            length = 0
            while (line := self._stream.readline().strip()) or not length:
                assert line or length, f"the debugger ended before {kind}"
                length = int(line.partition(b":")[2]) if line.lower().startswith(b"content-length") else length
            message = json.loads(self._stream.read(length))
            assert message.get("success", True), message
            if kind in (message.get("event"), message.get("command")):
                body: dict[str, Any] = message.get("body") or {}
                return body

    def close(self) -> None:
        """Hangs up, without which debugpy waits for ever."""
        self._stream.close()
        self._socket.close()


@pytest.fixture
def exercise(workspace: Workspace) -> Path:
    """The toy exercise, done, in a copy of the workspace; its check may take one second."""
    toy.plant(workspace)
    checks = workspace.top / toy.FOLDER / "test_solve.py"
    checks.write_text(toy.CHECKS.replace("@req", "@pytest.mark.limit(1)\n@req", 1))
    path = workspace.top / "work in progress" / toy.FILE
    path.parent.mkdir()
    path.write_text(toy.ANSWER)
    return path


@pytest.fixture
def debugged(workspace: Workspace, exercise: Path) -> Iterator[tuple[Debugger, subprocess.Popen[str]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check = f"{workspace.top}/{toy.FOLDER}/test_solve.py::test_doubles[torch.float32]"
    debugpy = ["-Xfrozen_modules=off", "-m", "debugpy", "--listen", f"127.0.0.1:{port}", "--wait-for-client"]
    tested = ["-m", "pytest", "--capture=no", f"--rootdir={workspace.top}", f"--submission={exercise.parent.name}"]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, *debugpy, *tested, check],
        cwd=workspace.top,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    client = Debugger(port)
    yield client, process
    client.close()
    process.kill()
    process.wait()


def test_a_breakpoint_in_an_exercise_is_hit(exercise: Path, debugged: tuple[Debugger, subprocess.Popen[str]]) -> None:
    client, process = debugged
    client.send("initialize", adapterID="python", pathFormat="path", linesStartAt1=True, columnsStartAt1=True)
    client.until("initialize")
    client.send("attach", subProcess=True, justMyCode=True)
    client.until("initialized")
    client.send("setBreakpoints", source={"path": str(exercise)}, breakpoints=[{"line": LINE}])
    assert client.until("setBreakpoints")["breakpoints"][0]["verified"]
    client.send("configurationDone")

    stopped = client.until("stopped")
    client.send("stackTrace", threadId=stopped["threadId"])
    frames = [
        (frame["name"], Path(frame["source"]["path"]).name) for frame in client.until("stackTrace")["stackFrames"]
    ]

    assert stopped["reason"] == "breakpoint"
    assert frames[:2] == [("double", toy.FILE), ("test_doubles", "test_solve.py")], frames
    time.sleep(1.5)  # Longer than the check may take: whoever debugs has all the time they want.
    client.send("continue", threadId=stopped["threadId"])
    client.until("terminated")
    client.close()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "1 passed" in output, output
