"""The thin end of every judging command: hands it to the warm process and waits. A plain script that imports little,
so that it starts in no time.

Usage: python -P checks/harness/runner/client.py (check|save) [options]

`save` is what pytest-watch runs: it starts the warm process where none runs. `check` uses a warm process that is
there, and
otherwise runs cold.
"""

import json
import os
import socket
import sys
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
CHECKS = os.path.join(TOP, "checks")
SOCKET = "build/warm.sock"
LOG = "build/warm.log"
START_SECONDS = 120


def main(arguments: list[str]) -> int:
    """Runs a command and returns its exit code."""
    os.chdir(TOP)
    os.makedirs("build", exist_ok=True)
    cold = os.environ.get("EXERCISES_COLD") or any(argument.startswith("--device=") for argument in arguments)
    watch = os.environ.get("EXERCISES_WATCH", "")
    if not cold:
        for _ in range(3):
            code = ask(arguments, watch)
            if code is not None:
                return code
            if arguments[0] != "save" or not start(watch):
                break
    command = [sys.executable, "-P", "-m", "harness", *arguments]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": CHECKS})


def ask(arguments: list[str], watch: str) -> int | None:
    """Sends a request with this process's terminal; the exit code, or None if no warm process took it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(SOCKET)
        except OSError:
            return None
        request = {
            "arguments": arguments,
            "owners": [int(watch)] if watch else [],
            "encoding": sys.stdout.encoding or "utf-8",
            "environment": {name: os.environ[name] for name in ("TERM", "NO_COLOR", "COLUMNS") if name in os.environ},
        }
        try:
            socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
            answer = connection.recv(64).decode()
        except OSError:
            return None
    if answer == "restart":
        print("the checks have changed; they are loaded anew …", flush=True)
        return None
    return int(answer) if answer else None


def start(watch: str) -> bool:
    """Starts the warm process and waits until it answers; False, with its last words, if it does not come up."""
    import subprocess

    print("loading torch and the checks …", flush=True)
    with open(LOG, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness", "serve", "--owner", watch or str(os.getppid())],
            env={**os.environ, "PYTHONPATH": CHECKS},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if os.path.exists(SOCKET) and probe.connect_ex(SOCKET) == 0:
                return True
        time.sleep(0.05)
    process.kill()
    with open(LOG, encoding="utf-8", errors="replace") as log:
        print(log.read().strip()[-2000:])
    return False


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
