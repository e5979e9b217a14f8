"""Sees by Python's own audit events what a submission asks of the system, however it asks.

Processes are refused: an exercise needs none, and what another process computes no check sees. Reading torch's source
text, or running a second copy of it, is noted: that is a way to prebuilt operations that no guard watches.
"""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

_PROCESSES = ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn")


LIBRARY = str(Path(torch.__file__).parent)
# What reads source text to make scripts of it.
_SCRIPTS = (f"{LIBRARY}/jit/", f"{LIBRARY}/_jit_internal.py", f"{LIBRARY}/_sources.py")
# What was noted in this process, in words.
notes: list[str] = []


@cache
def loaded() -> frozenset[str]:
    """The files of torch's modules; looked up before forks, each of which would copy the memory that they lie in."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "torch"]
    return frozenset(str(getattr(module, "__file__", "")) for module in modules)


def watch(submission: Path) -> None:
    """Watches what the code of a file does, for as long as the process lives."""
    files, own = loaded(), str(submission)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _PROCESSES:
            if any(_made(frame, own) for frame in _callers()):
                raise PermissionError(f"{event}: an exercise starts no processes")
        elif event == "exec":
            code = arguments[0]
            if isinstance(code, CodeType) and code.co_filename in files and code.co_name == "<module>":
                notes.append(f"a second copy of {Path(code.co_filename).name}")
        elif event == "open":
            path = arguments[0]
            if isinstance(path, str) and path.endswith(".py") and path.startswith(LIBRARY) and _reads_itself(own):
                notes.append(f"the source text of {Path(path).name}")

    sys.addaudithook(hook)


def _callers() -> Iterator[FrameType]:
    """The frames that led to an event, the last one first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _made(frame: FrameType, own: str) -> bool:
    """Whether a frame is the submission's, or of code that was made of a text."""
    file = frame.f_code.co_filename
    return file == own or (file.startswith("<") and not file.startswith("<frozen"))


def _reads_itself(own: str) -> bool:
    """Whether the submission reads torch's text: neither an import does, nor torch, whose scripts are read for it."""
    for frame in _callers():
        file = frame.f_code.co_filename
        if _made(frame, own):
            return True
        if file.startswith("<frozen importlib") or (file.startswith(LIBRARY) and not file.startswith(_SCRIPTS)):
            return False
    return False
