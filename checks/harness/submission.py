"""Loads one file of a submission, late and under its own name. A submission is any folder with files named like the
exercises.
"""

import ast
import sys
import traceback
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

MAX_BYTES = 1_000_000
_PRIVATE = ("answers", "checks", "harness")


class LoadError(Exception):
    """A submission's file cannot be used. `line` is where, 0 if nowhere in particular; `missing` says that there is
    no file at all.
    """

    def __init__(self, fact: str, line: int = 0, *, missing: bool = False) -> None:
        super().__init__(fact)
        self.fact = fact
        self.line = line
        self.missing = missing


def read(path: Path) -> str:
    """The text of a submission's file.

    Raises:
        LoadError: the file is missing, a link, no regular file, unreadable, too large or not UTF-8 text.
    """
    if path.is_symlink():
        raise LoadError("is a link; a regular file is wanted")
    if not path.exists():
        raise LoadError("no file", missing=True)
    if not path.is_file():
        raise LoadError("is not a regular file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LoadError(f"is {path.stat().st_size:,} bytes long; at most {MAX_BYTES:,} are read")
        data = path.read_bytes()
    except OSError as error:
        raise LoadError(f"cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise LoadError("holds null bytes", data[: data.index(b"\0")].count(b"\n") + 1)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise LoadError(f"is not UTF-8 text (byte {error.start})", data[: error.start].count(b"\n") + 1) from None


def isolated(path: Path, folder: Path) -> Path:
    """Copies a submission's file, alone, into `folder` and returns that; the file's own folder if it cannot be read,
    so that its checks say why.
    """
    try:
        text = read(path)
    except LoadError:
        return path.parent
    (folder / path.name).write_text(text, encoding="utf-8")
    return folder


def execute(text: str, path: Path, name: str) -> ModuleType:
    """Runs a file's text as the module `name`; `path` is what tracebacks and debuggers show.

    Raises:
        LoadError: the text does not parse, imports what is not for submissions, or raises.
    """
    code = _compiled(text, str(path), name)
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except LoadError:
        raise
    except BaseException as error:
        raise LoadError(f"{describe(error)} on import", line_in(error, path)) from None
    return module


@lru_cache(maxsize=16)
def _compiled(text: str, path: str, name: str) -> CodeType:
    try:
        tree = ast.parse(text)
        _refuse_private_imports(tree, name)
        return compile(text, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise LoadError(f"{type(error).__name__}: {error.msg}", error.lineno or 0) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise LoadError(f"does not parse: {type(error).__name__}: {error}") from None


def load(path: Path) -> ModuleType:
    """Reads and executes a submission's file under its own name."""
    return execute(read(path), path, path.stem)


def describe(error: BaseException) -> str:
    """An exception as `Type: text`, whatever its `__str__` does."""
    name = type(error).__name__
    try:
        text = str(error).strip()
    except BaseException:
        return f"{name} (whose text cannot be had)"
    return f"{name}: {text}" if text else name


def line_in(error: BaseException | None, path: Path) -> int:
    """The deepest line of the file `path` that an exception passed through, or 0."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return lines[-1] or 0 if lines else 0


def _refuse_private_imports(tree: ast.Module, own_name: str) -> None:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            if top in _PRIVATE or top == own_name:
                line = getattr(node, "lineno", 0)
                raise LoadError(f"imports {name}; an exercise stands on torch and the standard library alone", line)


class Subject:
    """A learner's module as checks see it: loaded at the first use of one of its names.

    Raises:
        LoadError: at first use, if the file cannot be loaded.
        AssertionError: the file lacks a name of the contract.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._module: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._module is None:
            self._module = load(self._path)
            neutral_state()
        if name not in vars(self._module):
            raise AssertionError(f"{self._path.name} defines no {name}; the contract asks for it")
        return vars(self._module)[name]


def neutral_state() -> None:
    """Sets torch's global state back to its defaults, whatever a learner's file did to it."""
    import torch

    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    if torch.are_deterministic_algorithms_enabled():  # The setter loads torch's compiler, for more than a second.
        torch.use_deterministic_algorithms(False)
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    seed(0)


def seed(number: int) -> None:
    """Seeds torch's CPU stream: torch.manual_seed without its slow notes to devices that are not there."""
    import torch

    torch.default_generator.manual_seed(number)
