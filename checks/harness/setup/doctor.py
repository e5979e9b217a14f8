"""Says what works here and what does not, each with its way out: `ok …` or `!! … what to do`.

Usage: python3 checks/harness/setup/doctor.py VENV_BIN

A plain script for any Python 3, since it also has to work where .venv is half made. What needs the packages is tried
by `harness.setup.examine` with the interpreter of .venv. Exits with 1 if something that the workspace needs is broken.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).resolve().parents[3]
NEEDED = (3, 11)
AGAIN = "rm -f .venv/ready && make setup"
SECONDS = 120
SETUP_GB, CUDA_SETUP_GB = 1.5, 6.0


class Finding(NamedTuple):
    """One line of the report. `broken` says that the workspace does not work without it."""

    mark: str
    text: str
    broken: bool = False


def ok(text: str) -> Finding:
    """What works."""
    return Finding("ok", text)


def bad(text: str, broken: bool = False) -> Finding:
    """What does not, and the way out."""
    return Finding("!!", text, broken)


def findings(python: Path) -> Iterator[Finding]:
    """Everything that can be found out, the interpreter first: without it the packages are not looked at."""
    found = interpreter(python)
    yield found
    if not found.broken:
        if not (TOP / ".venv" / "ready").exists():
            yield bad("set-up: has not ended; make setup goes on", broken=True)
        packages = list(examined(python, "packages"))
        yield from packages
        if not any(finding.broken for finding in packages):
            for name in ("torch", "cuda", "forking", "events", "types"):
                yield from examined(python, name)
    yield from folder()
    yield memory()
    yield disk(set_up=not found.broken)
    yield from leftovers()


def interpreter(python: Path) -> Finding:
    """Whether .venv holds a Python that runs and is new enough."""
    shown = os.path.relpath(str(python), str(TOP))
    if not os.path.lexists(str(python)):
        return bad(f"Python: {shown} is not there; make setup", broken=True)
    try:
        command = [str(python), "-c", "import sys; print(*sys.version_info[:3])"]
        said = subprocess.check_output(command, stderr=subprocess.STDOUT, timeout=SECONDS).decode().split()
    except (OSError, subprocess.SubprocessError) as error:
        return bad(f"Python: {shown} does not run ({type(error).__name__}); rm -r .venv && make setup", broken=True)
    version = ".".join(said)
    if tuple(map(int, said[:2])) < NEEDED:
        return bad(f"Python: {version} is too old, 3.11 is needed; rm -r .venv && make setup PYTHON=…", broken=True)
    return ok(f"Python: {version} in {shown}")


def examined(python: Path, name: str) -> Iterator[Finding]:
    """What harness.examine says of one thing; if it dies, its last words."""
    command = [str(python), "-P", "-W", "ignore", "-m", "harness.setup.examine", name]
    variables = {**os.environ, "PYTHONPATH": str(TOP / "checks")}
    try:
        done = subprocess.run(command, cwd=str(TOP), env=variables, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        yield bad(f"{name}: did not answer within {SECONDS} s", broken=True)
        return
    lines = done.stdout.decode(errors="replace").splitlines()
    yield from (Finding(*json.loads(line)) for line in lines if line.startswith('["'))
    if done.returncode != 0:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield bad(f"{name}: {last}; {AGAIN}", broken=True)


def folder() -> Iterator[Finding]:
    """Whether the workspace can be written to."""
    if not os.access(str(TOP), os.W_OK):
        yield bad("folder: it cannot be written to, it is somebody else's; clone the workspace anew", broken=True)


def memory() -> Finding:
    """Memory that can still be had, within the limit of a container."""
    free = _free_memory()
    if free is None:
        return ok("memory: this system does not tell")
    gb = free / 1e9
    if gb < 2:
        return bad(f"memory: {gb:.1f} GB can be had; watching takes 0.7 GB, the first type check 0.8: close something")
    return ok(f"memory: {gb:.1f} GB can be had")


def _free_memory() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, float(Path(limit).read_text()) - float(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # No such limit, or "max".
    return free


def disk(set_up: bool) -> Finding:
    """Room on the disk: for the set-up if that is still to come, else for caches."""
    gb = shutil.disk_usage(str(TOP)).free / 1e9
    if not set_up and gb < SETUP_GB:
        fact = f"disk: {gb:.1f} GB are free; make setup takes {SETUP_GB:g} GB, {CUDA_SETUP_GB:g} GB with CUDA"
        return bad(f"{fact}: make room", broken=True)
    if gb < 0.2:
        return bad(f"disk: {gb:.2f} GB are free; make room, or nothing can be saved", broken=True)
    return ok(f"disk: {gb:.1f} GB are free")


def leftovers() -> Iterator[Finding]:
    """The warm process of make watch, and what is left of one that was killed."""
    path, running = TOP / "build" / "warm.sock", _warm_processes()
    if running and not _watched():
        time.sleep(2)  # It ends by itself a second after its last watch.
        running = [pid for pid in _warm_processes() if pid in running and not _watched()]
        for pid in running:
            yield bad(f"warm process: {pid} runs although no make watch does; kill {pid}")
        if running:
            return
    if not os.path.lexists(str(path)):
        yield ok("warm process: none, and nothing is left of one")
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        try:
            os.chdir(str(TOP))
            probe.connect(os.path.relpath(str(path), str(TOP)))
        except OSError:
            yield bad("warm process: none, but its socket is left; rm build/warm.sock")
            return
    yield ok("warm process: runs and answers")


def _watched() -> bool:
    return any("pytest_watch" in command for command in _commands().values())


def _warm_processes() -> list[int]:
    return [pid for pid, command in _commands().items() if "harness serve" in command]


def _commands() -> dict[int, str]:
    """The command lines of the processes that work in this folder, where the system tells."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(str(entry / "cwd")) == str(TOP):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def main(venv: str) -> int:
    """Prints the findings; 1 if one of them is broken."""
    broken = False
    for finding in findings(TOP / venv / "python"):
        print(f"{finding.mark} {finding.text}", flush=True)
        broken = broken or finding.broken
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except BrokenPipeError:  # Whoever read has gone: `make doctor | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
