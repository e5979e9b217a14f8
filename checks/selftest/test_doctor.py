"""`make doctor`: a line for everything that the workspace stands on, with the way out where one is needed."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.workspace import Workspace
from harness.model.paths import TOP
from harness.setup import install
from harness.setup.doctor import bad, folder, interpreter, ok
from harness.setup.examine import Gpu, about_cuda, file_system


def doctor(workspace: Workspace, venv: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`make doctor` in a copy, with the tests' own environment or with another one."""
    bins = venv or Path(sys.executable).parent
    command = ["make", "--no-print-directory", "doctor", f"VENV={bins}", f"PYTHON={sys.executable}"]
    return subprocess.run(
        command, cwd=workspace.top, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200
    )


def test_a_sound_workspace_is_ok(workspace: Workspace) -> None:
    done = doctor(workspace)

    assert done.returncode == 0, done.stdout
    for line in (
        r"ok Python: 3\.\d+\.\d+ in .*python",
        r"ok packages: torch 2\S+, pytest \S+, pytest-watch \S+, watchdog \S+, ruff \S+, mypy .*, as pinned",
        r"ok torch: 2\S+ computes \(\d+ ms for a first product\)",
        r"(ok|!!) CUDA: .*",
        r"ok forking: a fork computes",
        r"ok file events: one came \d+ ms after a write in exercises/",
        r"ok ruff: ruff \S+ runs",
        r"ok mypy: judged a starter in [\d.]+ s .*",
        r"(ok|!!) memory: [\d.]+ GB can be had.*",
        r"ok disk: [\d.]+ GB are free",
        r"ok warm process: none, and nothing is left of one",
    ):
        assert re.search(rf"^{line}$", done.stdout, re.MULTILINE), f"{line}\n{done.stdout}"
    assert not [path for path in (workspace.top / "exercises").iterdir() if path.name.startswith(".doctor")]


def test_a_folder_of_somebody_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(folder())

    monkeypatch.setattr("os.access", lambda path, mode: False)

    (found,) = folder()
    assert found.broken and found.text.startswith("folder: it cannot be written to"), found


def test_pip_writes_into_the_environment_whatever_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setattr("subprocess.call", lambda command: int(os.environ["PIP_USER"]))

    assert install.packages("")


def test_what_does_not_work_is_said_with_the_way_out(workspace: Workspace) -> None:
    """Another pin, no file events, forks that are not wanted, a broken mypy, a socket that nobody listens at."""
    pins = workspace.top / "requirements.txt"
    pins.write_text(re.sub(r"ruff==.*", "ruff==0.0.1", pins.read_text()))
    for name in ("__init__.py", "events.py", "observers.py"):
        path = workspace.top / "checks" / "watchdog" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SILENT.get(name, ""))
    (workspace.top / "build" / "mypy").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        scratch = workspace.top.parent / "s"
        listener.bind(str(scratch))
        scratch.rename(workspace.top / "build" / "warm.sock")

    done = doctor(workspace)

    said = done.stdout
    assert done.returncode == 2, said
    wrong = (
        r"^!! packages: ruff is [\d.]+, not 0\.0\.1, as requirements\.txt pins it; rm -f \.venv/ready && make setup$"
    )
    assert re.search(wrong, said, re.MULTILINE), said
    assert "!! warm process: none, but its socket is left; rm build/warm.sock\n" in said

    pins.write_text((TOP / "requirements.txt").read_text())
    done = doctor(workspace)
    assert done.returncode == 0, done.stdout
    silent = r"^!! file events: none within 3 s of a write in exercises/ \(\w+\); make watch POLL=1$"
    assert re.search(silent, done.stdout, re.MULTILINE), done.stdout
    assert "!! mypy: build/mypy holds no cache; the next check takes 10 to 20 s longer, once\n" in done.stdout


SILENT = {
    "events.py": "class FileSystemEvent: ...\nclass FileSystemEventHandler: ...\n",
    "observers.py": """
class Observer:
    def schedule(self, *arguments, **options): ...
    def start(self): ...
    def is_alive(self): return False
""",
}


def test_a_half_made_environment_is_said_in_plain_words(workspace: Workspace, tmp_path: Path) -> None:
    nothing = doctor(workspace, tmp_path / "bin")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    empty = doctor(workspace, tmp_path / "empty" / "bin")

    assert nothing.returncode == empty.returncode == 2
    assert re.search(r"^!! Python: \S+/bin/python is not there; make setup$", nothing.stdout, re.MULTILINE)
    missing = r"^!! packages: torch, pytest, pytest-watch, .* not installed; rm -f \.venv/ready && make setup$"
    assert re.search(missing, empty.stdout, re.MULTILINE), empty.stdout
    for said in (nothing.stdout, empty.stdout):
        assert "Traceback" not in said and " disk: " in said and "torch:" not in said, said
    assert "!! set-up: has not ended; make setup goes on\n" in empty.stdout


def test_an_interpreter_that_does_not_run_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(tmp_path / "gone")
    says = interpreter(tmp_path / "python")

    assert says.broken and "does not run (FileNotFoundError); rm -r .venv && make setup" in says.text


CPU, BUILD = "2.13.0+cpu", "2.13.0+cu130"
NEXT = "everything that earns points runs on the CPU"


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        (Gpu(CPU, "", ""), ok(f"CUDA: none; {NEXT}")),
        (
            Gpu(CPU, "", "580.65.06"),
            bad(
                f"CUDA: an NVIDIA driver (580.65.06) is here, but torch {CPU} is a build for the CPU; "
                "rm -r .venv && make setup takes the build for CUDA"
            ),
        ),
        (
            Gpu(BUILD, "13.0", "580.65.06", ("NVIDIA L4, 24 GB",)),
            ok(f"CUDA: torch {BUILD} is built for CUDA 13.0, driver 580.65.06; a kernel ran on NVIDIA L4, 24 GB"),
        ),
        (
            Gpu(BUILD, "13.0", "535.1", ("NVIDIA L4, 24 GB",), "no kernel image is available"),
            bad(
                f"CUDA: torch {BUILD} is built for CUDA 13.0, driver 535.1, but no kernel image is available; a driver "
                f"new enough for CUDA 13.0 (580 for 13, 525 for 12) and nvidia-smi are worth a look; {NEXT}"
            ),
        ),
        (
            Gpu(BUILD, "13.0", "580.65.06"),
            bad(
                f"CUDA: torch {BUILD} is built for CUDA 13.0, driver 580.65.06, but no device is seen; in a container "
                f"the host needs the NVIDIA Container Toolkit; {NEXT}"
            ),
        ),
        (
            Gpu(BUILD, "13.0", ""),
            ok(f"CUDA: torch {BUILD} is built for CUDA 13.0, and no NVIDIA driver is here; {NEXT}"),
        ),
    ],
)
def test_cuda_in_every_state(gpu: Gpu, says: object) -> None:
    assert about_cuda(gpu) == says


def test_the_file_system_of_a_folder(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("a / ext4 rw 0 0\nb /work\\040space virtiofs rw 0 0\n")

    assert file_system(Path("/work space/w/exercises"), mounts) == "virtiofs"
    assert file_system(Path("/home/w"), mounts) == "ext4"
    assert file_system(Path("/home/w"), tmp_path / "none") == "unknown"
