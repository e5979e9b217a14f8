"""The thin end of every judging command: hands it to the warm process and waits. A plain script that imports little,
so that it starts in no time.

Usage: python -P checks/harness/runner/client.py (check|save) [options]

`save` is what pytest-watch runs: it starts the warm process where none runs. `check` uses a warm process that is
there, and
otherwise runs cold.
"""

import _signal  # type: ignore[import-not-found]

# pytest-watch interrupts it whenever another save comes, while it starts too: it ends without a word. The module that
# `signal` is made of is there at once.
_signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import json  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
CHECKS = os.path.join(TOP, "checks")
SOCKET = "build/warm.sock"
LOG = "build/warm.log"
START_SECONDS, PATIENCE_SECONDS = 600, 60
_PASSED_ON = ("TERM", "TERM_PROGRAM", "NO_COLOR", "COLUMNS", "LINES")


def main(arguments: list[str]) -> int:
    """Runs a command and returns its exit code."""
    os.chdir(TOP)
    cold = os.environ.get("EXERCISES_COLD") or any(argument.startswith("--device=") for argument in arguments)
    try:
        os.makedirs("build", exist_ok=True)
        writable = os.access("build", os.W_OK)
    except OSError:
        writable = False
    if not writable:
        print("build/ cannot be written to: nothing is kept, and each save is judged cold; make doctor says more")
        cold = True
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
            "environment": {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
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
    slow, deadline = time.monotonic() + PATIENCE_SECONDS, time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if os.path.exists(SOCKET) and probe.connect_ex(SOCKET) == 0:
                return True
        if time.monotonic() > slow:
            print("it still loads: a slow disk or a busy machine takes minutes, the first time most", flush=True)
            slow = deadline
        time.sleep(0.05)
    process.kill()
    with open(LOG, encoding="utf-8", errors="replace") as log:
        print(log.read().strip()[-2000:])
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
