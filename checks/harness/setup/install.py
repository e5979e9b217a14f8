"""Sets the workspace up: a virtual environment in .venv with the pinned packages, and mypy's cache of torch's types.

Usage: python3 checks/harness/setup/install.py [TORCH_INDEX]

A plain script for any Python 3: it looks for one that is new enough by itself. What was interrupted is finished by the
next call.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

NEEDED = (3, 11)
TOP = Path(__file__).resolve().parents[3]
VENV = TOP / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ready"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def main(index: str) -> int:
    """Installs everything; returns an exit code, after one sentence on what went wrong."""
    if sys.version_info < NEEDED:
        return with_newer_python()
    no_pip = "pip failed; is the network there? The same command goes on from here"
    steps = (
        ("creating .venv", environment, "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"),
        ("installing the packages of requirements.txt", lambda: packages(index), no_pip),
        ("reading torch's types once, for mypy", types, "mypy could not read torch's types"),
    )
    for what, step, trouble in steps:
        print(f"setup: {what} …", flush=True)
        if not step():
            print(f"setup: {trouble}")
            return 1
    STAMP.touch()
    return 0


def with_newer_python() -> int:
    """Runs this script again with the newest suitable Python on PATH."""
    found = [shutil.which(f"python3.{minor}") for minor in (13, 12, 11)]
    usable = [path for path in found if path and subprocess.call([path, "-c", ""], stderr=subprocess.DEVNULL) == 0]
    if not usable:
        here = ".".join(map(str, sys.version_info[:3]))
        print(f"setup: Python 3.11 or newer is needed; {sys.executable} is {here} and no python3.11 to 3.13 is on PATH")
        return 1
    return subprocess.call([usable[0], *sys.argv])


def environment() -> bool:
    """A virtual environment with pip; a half-made one is made anew."""
    if PYTHON.exists() and subprocess.call([PYTHON, "-m", "pip", "--version"], stdout=subprocess.DEVNULL) == 0:
        return True
    return subprocess.call([sys.executable, "-m", "venv", "--clear", VENV]) == 0


def packages(index: str) -> bool:
    """The pinned packages; torch for the CPU from its own index, unless an NVIDIA driver is here or the index is
    empty.
    """
    options = []
    if index and not NVIDIA_DRIVER.exists():
        # Without retries an index that cannot be reached costs nothing: pip goes on with the ordinary one.
        options = ["--retries", "0", "--extra-index-url", index]
    os.environ["PIP_USER"] = "0"  # Set, it has pip install beside .venv rather than into it.
    quiet = [] if os.environ.get("VERBOSE") else ["--quiet"]
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *quiet, *options]
    return subprocess.call([*command, "-r", str(TOP / "requirements.txt")]) == 0


def types() -> bool:
    """Fills mypy's caches, which spares the first check ten seconds and more."""
    paths = {**os.environ, "PYTHONPATH": str(TOP / "checks")}
    return subprocess.call([PYTHON, "-P", "-m", "harness.testing.lint"], env=paths, cwd=TOP) == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
