"""Sees by Python's own audit events what a submission asks of the system, however it asks.

Refused are processes and connections (an exercise needs none, and what another process computes no check sees), other
bodies for functions, and, in grading, traces, which may write to the judge's variables. Noted, for "from scratch", is
where prebuilt code may come from: torch's source text, a second copy of it, code made of text or of code objects,
another file, another package.
"""

import os
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

_PROCESSES = ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn")
_NETWORK = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")
_TRACES = ("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback")
_WHY = dict.fromkeys(_PROCESSES, "an exercise starts no processes")
_WHY |= dict.fromkeys(_NETWORK, "an exercise uses no network")
_BODY = ("__code__", "__defaults__", "__kwdefaults__")

# torch's folder, as code names it and without links: .venv may be one.
_LIBRARY = str(Path(torch.__file__).parent)
_LIES_IN = os.path.realpath(_LIBRARY)
# What reads source text to make scripts of it.
_SCRIPTS = (f"{_LIBRARY}/jit/", f"{_LIBRARY}/_jit_internal.py", f"{_LIBRARY}/_sources.py")
# What runs a text for whoever asks.
_RUNNERS = ("/runpy.py", "/code.py")
_PACKAGES = frozenset({"torch", "numpy", *sys.stdlib_module_names})
# What was noted in this process, in words.
notes: list[str] = []
_real, _plain = os.path.realpath, os.fsdecode


@cache
def loaded() -> frozenset[str]:
    """The files of torch's modules; looked up before forks, each of which would copy the memory that they lie in."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "torch"]
    return frozenset(str(getattr(module, "__file__", "")) for module in modules)


def watch(submission: Path, *, graded: bool = False) -> None:
    """Watches what the code of a file does, for as long as the process lives."""
    files, own = loaded(), str(submission)
    installed = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    refused = _WHY | (dict.fromkeys(_TRACES, "nobody watches the judge") if graded else {})
    look, note = sys._getframe, notes.append

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in refused:
            if _by_submission(look(1), own):
                raise PermissionError(f"{event}: {refused[event]}")
        elif event == "object.__setattr__":
            if arguments[1] in _BODY and _is(look(1), own):
                raise PermissionError(f"{arguments[1]}: a function keeps its body")
        elif event == "exec":
            code, caller = arguments[0], look(1)
            if not isinstance(code, CodeType) or not _by_submission(caller, own):
                return
            if code.co_filename in files:
                note(f"a second copy of {Path(code.co_filename).name}")
            elif _is_import(caller):
                if not code.co_filename.startswith(installed):
                    note(f"another file, {Path(code.co_filename).name}")
            elif _is(caller, own) or caller.f_code.co_filename.endswith(_RUNNERS):
                note("code made of text")
        elif event == "open":
            path, caller = arguments[0], look(1)
            if isinstance(path, (str, bytes)) and not _is_import(caller) and _reads_itself(caller, own):
                real = _real(_plain(path))
                if real.startswith(_LIES_IN) and real.endswith((".py", ".pyc")):
                    note(f"the source text of {Path(real).name}")
        elif event in ("compile", "marshal.loads", "code.__new__", "function.__new__"):
            if _is(look(1), own):
                note("code made of text" if event == "compile" else "code made by hand")
        elif event == "object.__getattr__":
            torchs = arguments[1] == "__code__" and str(getattr(arguments[0], "__module__", "")).startswith("torch")
            if torchs and _is(look(1), own):
                note(f"the code of {arguments[0].__name__}")
        elif event == "import":
            package = arguments[0].partition(".")[0]
            if package not in _PACKAGES and package not in sys.modules and _is(_importer(look(1)), own):
                note(f"the package {package}")

    sys.addaudithook(hook)


def _is(frame: FrameType | None, own: str) -> bool:
    """Whether this is the submission's code, or code that was made of a text."""
    if frame is None:
        return False
    file = frame.f_code.co_filename
    return file == own or (file.startswith("<") and not file.startswith("<frozen"))


def _by_submission(frame: FrameType | None, own: str) -> bool:
    """Whether the submission's code, or code that was made of a text, is among those that called."""
    while frame is not None:
        if _is(frame, own):
            return True
        frame = frame.f_back
    return False


def _reads_itself(frame: FrameType | None, own: str) -> bool:
    """Whether the submission reads, rather than torch on its behalf; scripts are read for the submission."""
    while frame is not None:
        if _is(frame, own):
            return True
        if frame.f_code.co_filename.startswith(_LIBRARY) and not frame.f_code.co_filename.startswith(_SCRIPTS):
            return False
        frame = frame.f_back
    return False


def _is_import(frame: FrameType | None) -> bool:
    """Whether an import statement asks, not somebody who calls a loader."""
    while frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        if frame.f_code.co_name == "_find_and_load":
            return True
        frame = frame.f_back
    return False


def _importer(frame: FrameType | None) -> FrameType | None:
    """Who imports, by a statement or by importlib.import_module."""
    while frame is not None and frame.f_code.co_filename.endswith(("importlib/__init__.py", "_bootstrap>")):
        frame = frame.f_back
    return frame
