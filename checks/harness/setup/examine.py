"""What `make doctor` tries with the interpreter of .venv: packages, torch, CUDA, forking, file events, types.

Usage: python -P -m harness.setup.examine (packages|torch|cuda|forking|events|types)

Each is a process of its own, so that what crashes here is one line there. Prints one JSON list a finding.
"""

import importlib.metadata
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.setup.doctor import AGAIN, TOP, Finding, bad, ok

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
POLL = "make watch POLL=1"
EVENT_SECONDS = 3.0
FORK_SECONDS = 20.0
WHOLE_CACHE_SECONDS = 8.0
# File systems that show files of another machine: what is saved there sends no events here.
FOREIGN = ("9p", "virtiofs", "nfs", "nfs4", "cifs", "smb3", "vboxsf", "fakeowner", "grpcfuse", "osxfs", "drvfs")


@dataclass(frozen=True)
class Gpu:
    """What torch and the system say of CUDA; `trouble` is why no kernel ran."""

    torch: str
    build: str
    driver: str
    devices: tuple[str, ...] = ()
    trouble: str = ""


def packages() -> Iterator[Finding]:
    """The versions that are here against the pins of requirements.txt."""
    here, wrong, missing = [], [], []
    for line in (TOP / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.partition("#")[0].strip().partition("==")
        if not pinned:
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        here.append(f"{name} {found}")
        if found.partition("+")[0] != version:
            wrong.append(f"{name} is {found}, not {version}")
    if missing:
        yield bad(f"packages: {', '.join(missing)} not installed; {AGAIN}", broken=True)
    if wrong:
        yield bad(f"packages: {'; '.join(wrong)}, as requirements.txt pins it; {AGAIN}", broken=True)
    if not missing and not wrong:
        yield ok(f"packages: {', '.join(here)}, as pinned")


def torch() -> Iterator[Finding]:
    """Whether torch loads and computes."""
    import torch

    start = time.perf_counter()
    assert (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item() == 64**3
    took = time.perf_counter() - start
    yield ok(f"torch: {torch.__version__} computes ({1000 * took:.0f} ms for a first product)")


def cuda() -> Iterator[Finding]:
    """Whether a GPU is here, and a kernel runs on it."""
    import torch

    driver = ""
    if NVIDIA_DRIVER.exists():
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", NVIDIA_DRIVER.read_text())
        driver = found[0] if found else "of an unknown version"
    devices: tuple[str, ...] = ()
    trouble = ""
    try:
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            devices += (f"{about.name}, {about.total_memory / 1e9:.0f} GB",)
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.ones(8, 8, device=f"cuda:{number}", dtype=dtype)
                assert (x @ x).sum().item() == 512
    except Exception as error:
        trouble = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    yield about_cuda(Gpu(torch.__version__, torch.version.cuda or "", driver, devices, trouble))


def about_cuda(gpu: Gpu) -> Finding:
    """The line on CUDA; nothing that earns points needs it, so that nothing is broken without it."""
    everything = "everything that earns points runs on the CPU"
    if not gpu.build:
        if gpu.driver:
            fact = f"an NVIDIA driver ({gpu.driver}) is here, but torch {gpu.torch} is a build for the CPU"
            return bad(f"CUDA: {fact}; rm -r .venv && make setup takes the build for CUDA")
        return ok(f"CUDA: none; {everything}")
    build = f"torch {gpu.torch} is built for CUDA {gpu.build}"
    if gpu.trouble:
        needed = f"a driver new enough for CUDA {gpu.build} (580 for 13, 525 for 12) and nvidia-smi are worth a look"
        return bad(f"CUDA: {build}, driver {gpu.driver or 'none'}, but {gpu.trouble}; {needed}; {everything}")
    if gpu.devices:
        return ok(f"CUDA: {build}, driver {gpu.driver or 'not told'}; a kernel ran on {'; '.join(gpu.devices)}")
    if gpu.driver:
        fact = f"{build}, driver {gpu.driver}, but no device is seen"
        return bad(f"CUDA: {fact}; in a container the host needs the NVIDIA Container Toolkit; {everything}")
    return ok(f"CUDA: {build}, and no NVIDIA driver is here; {everything}")


def forking() -> Iterator[Finding]:
    """Whether a fork of a process that has computed can compute, as the warm process needs it."""
    import torch

    from harness.sandbox.processes import CAN_FORK

    if not CAN_FORK:
        yield ok("forking: not used on this system, or EXERCISES_COLD is set; each save is judged in some seconds")
        return
    torch.set_num_threads(1)
    x = torch.ones(300, 300)
    _ = x @ x
    fork = multiprocessing.get_context("fork").Process(target=torch.mm, args=(x, x), daemon=True)
    fork.start()
    fork.join(FORK_SECONDS)
    if fork.exitcode == 0:
        yield ok("forking: a fork computes")
    else:
        how = "hangs" if fork.exitcode is None else f"ends with {fork.exitcode}"
        fork.kill()
        yield bad(f"forking: a fork {how}; EXERCISES_COLD=1 make watch judges each save in some seconds", broken=True)


def events() -> Iterator[Finding]:
    """Whether a file that is written in exercises/ is seen by what pytest-watch watches with."""
    from watchdog.events import FileSystemEvent, FileSystemEventHandler
    from watchdog.observers import Observer

    folder = TOP / "exercises" if (TOP / "exercises").is_dir() else TOP
    path, seen = folder / f".doctor-{os.getpid()}", threading.Event()

    class Handler(FileSystemEventHandler):
        def on_any_event(self, event: FileSystemEvent) -> None:
            if Path(os.fsdecode(event.src_path)).name == path.name:
                seen.set()

    observer = Observer()
    observer.schedule(Handler(), str(folder), recursive=True)
    try:
        observer.start()
        start = time.perf_counter()
        path.write_text("A file of make doctor.\n", encoding="utf-8")
        arrived = seen.wait(EVENT_SECONDS)
        took = time.perf_counter() - start
    except OSError as error:
        yield bad(f"file events: this folder cannot be watched ({error.strerror or error}); {POLL}")
        return
    finally:
        path.unlink(missing_ok=True)
        if observer.is_alive():
            observer.stop()
            observer.join()
    kind = file_system(folder, Path("/proc/self/mounts"))
    if not arrived:
        yield bad(f"file events: none within {EVENT_SECONDS:g} s of a write in {folder.name}/ ({kind}); {POLL}")
    elif kind in FOREIGN:
        yield bad(f"file events: {folder.name}/ is on {kind}; what another machine saves may send none: {POLL}")
    else:
        yield ok(f"file events: one came {1000 * took:.0f} ms after a write in {folder.name}/")


def file_system(folder: Path, mounts: Path) -> str:
    """The kind of file system that a folder is on, "unknown" where the system does not tell."""
    try:
        rows = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return "unknown"
    points = {Path(row[1].replace("\\040", " ")): row[2] for row in rows}
    return next((points[place] for place in (folder, *folder.parents) if place in points), "unknown")


def types() -> Iterator[Finding]:
    """Whether ruff runs, and mypy with its cache of torch's types."""
    from ruff import find_ruff_bin

    from harness.model.exercise import exercises
    from harness.testing.lint import LintError, mypy

    said = subprocess.run([find_ruff_bin(), "--version"], capture_output=True, text=True, check=True)
    yield ok(f"ruff: {said.stdout.strip()} runs")
    cache = TOP / "build" / "mypy"
    if not any(cache.rglob("*.db")) and not any(cache.rglob("*.json")):
        yield bad("mypy: build/mypy holds no cache; the next check takes 10 to 20 s longer, once")
        return
    start = time.perf_counter()
    try:
        mypy(next(iter(exercises().values())).starter_file)
    except LintError as error:
        yield bad(f"mypy: finds fault with a starter ({str(error).splitlines()[-1]}); {AGAIN}", broken=True)
    except Exception as error:
        yield bad(f"mypy: {' '.join(str(error).split())[:200]}; rm -rf build/mypy && {AGAIN}", broken=True)
    else:
        took = time.perf_counter() - start
        how = "with its cache" if took < WHOLE_CACHE_SECONDS else "since its cache had gaps; now it has none"
        yield ok(f"mypy: judged a starter in {took:.1f} s {how}")


EXAMINATIONS = {
    "packages": packages,
    "torch": torch,
    "cuda": cuda,
    "forking": forking,
    "events": events,
    "types": types,
}

if __name__ == "__main__":
    for finding in EXAMINATIONS[sys.argv[1]]():
        print(json.dumps(finding), flush=True)
