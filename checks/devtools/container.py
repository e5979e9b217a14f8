"""Brings the dev container up with the real dev-container CLI, in the order in which Codespaces does, and judges the
answers inside. Works on a copy of what git tracks or would add; container and copy are gone afterwards.

Usage: python -P -m devtools.container
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.model.paths import TOP

CLI = "@devcontainers/cli@0.89.0"
CONTAINER_USER = 1000
STEPS = (
    ("prebuild: set-up, as Codespaces does ahead", ["up", "--prebuild"]),
    ("start and attach: the board", ["up"]),
    ("judge the answers inside", ["exec", "make", "check", "SUBMISSION=answers"]),
)


def main() -> int:
    """Runs the steps; returns an exit code, after one line on what failed."""
    if missing := trouble():
        print(f"test-container: {missing}")
        return 1
    # Resolved: macOS's temporary folder is a link that Docker's machine does not have.
    with tempfile.TemporaryDirectory(prefix="test-container-") as folder:
        workspace = Path(folder).resolve() / "workspace"
        copy(workspace)
        try:
            return run(workspace)
        finally:
            remove(workspace)


def trouble() -> str:
    """What is missing for the trial, as one sentence; empty if nothing is."""
    for program, wanted in (("git", "git"), ("docker", "Docker"), ("npx", "Node 20 or newer")):
        if shutil.which(program) is None:
            return f"{program} is not there; install {wanted}"
    asked = subprocess.run(["docker", "info"], capture_output=True, text=True)
    if asked.returncode != 0:
        said = asked.stderr.strip().splitlines() or ["no word why"]
        return f"docker does not answer ({said[-1]}); start Docker"
    return ""


def copy(workspace: Path) -> None:
    """Copies what git tracks or would add, for the container's user."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TOP, check=True, capture_output=True, text=True).stdout
    workspace.mkdir()
    for name in listed.split("\0"):
        if name and (TOP / name).exists():
            (workspace / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, workspace / name)
    # The CLI gives the container's user the caller's id, but not root's.
    if os.getuid() == 0:
        for path in (workspace, *workspace.rglob("*")):
            os.chown(path, CONTAINER_USER, CONTAINER_USER)


def run(workspace: Path) -> int:
    """Runs the steps on the copy; 0 if all went well."""
    for what, (verb, *arguments) in STEPS:
        print(f"test-container: {what} …", flush=True)
        start = time.monotonic()
        command = ["npx", "--yes", CLI, verb, "--workspace-folder", str(workspace), *arguments]
        code = subprocess.call(command, stdin=subprocess.DEVNULL)
        if code == 0 and not (workspace / ".venv" / "ready").exists():
            print("test-container: the prebuild has not set the workspace up; which stage runs make setup?")
            return 1
        if code != 0:
            print(f"test-container: this step ended with exit code {code}")
            return 1
        print(f"test-container: done in {time.monotonic() - start:.0f} s", flush=True)
    return 0


def remove(workspace: Path) -> None:
    """Removes the containers of this copy, and the images that the CLI made for them alone."""
    wanted = ["--all", "--filter", f"label=devcontainer.local_folder={workspace}", "--format", "{{.ID}} {{.Image}}"]
    listed = subprocess.run(["docker", "ps", *wanted], capture_output=True, text=True).stdout
    for identity, image in (line.split() for line in listed.splitlines()):
        subprocess.run(["docker", "rm", "--force", "--volumes", identity], stdout=subprocess.DEVNULL)
        if image.startswith("vsc-"):
            subprocess.run(["docker", "rmi", image], stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
