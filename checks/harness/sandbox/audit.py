"""Sees by Python's own audit events what a submission asks of the system, however it asks.

Processes are refused: an exercise needs none, and what another process computes no check sees. Reading torch's source
text, or running a second copy of it, is noted: that is a way to prebuilt operations that no guard watches.
"""

import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

_PROCESSES = ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn")


LIBRARY = str(Path(torch.__file__).parent)
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
            if _by_submission(sys._getframe(1), own):
                raise PermissionError(f"{event}: an exercise starts no processes")
        elif event == "exec":
            code = arguments[0]
            if isinstance(code, CodeType) and code.co_filename in files and code.co_name == "<module>":
                notes.append(f"a second copy of {Path(code.co_filename).name}")
        elif event == "open":
            path, frame = arguments[0], sys._getframe(1)
            source = isinstance(path, str) and path.endswith(".py") and path.startswith(LIBRARY)
            imported = frame.f_code.co_filename.startswith("<frozen importlib")
            if source and not imported and _by_submission(frame, own):
                notes.append(f"the source text of {Path(path).name}")

    sys.addaudithook(hook)


def _by_submission(frame: FrameType | None, own: str) -> bool:
    """Whether the submission's code, or code that was made of a text, is among those that called."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file == own or (file.startswith("<") and not file.startswith("<frozen")):
            return True
        frame = frame.f_back
    return False
