"""Loads one file of a submission, late and under its own name; and the layers in it that an exercise gives."""

import ast
import re
import sys
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from harness.model.submission import LoadError, describe, line_in, read

# What lies beside the harness on the path, or holds the answers; another exercise's folder too.
_PRIVATE = re.compile(r"answers|checks|conftest|devtools|harness|selftest|ex\d\d_\w+")


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
        fact = f"{describe(error)} on import"
        if isinstance(error, ModuleNotFoundError):
            fact += "; a submission is one file on torch and the standard library"
        raise LoadError(fact, line_in(error, path)) from None
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


def _refuse_private_imports(tree: ast.Module, own_name: str) -> None:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            if _PRIVATE.fullmatch(top) or top == own_name:
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

    def again(self) -> "Subject":
        """The same file, loaded anew: nothing that it kept is left."""
        return Subject(self._path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._module is None:
            # What the check has set stays, whatever loading does: gradients off, a seed.
            gradients, stream = torch.is_grad_enabled(), torch.default_generator.get_state()
            self._module = load(self._path)
            neutral_state()
            torch.set_grad_enabled(gradients)
            torch.default_generator.set_state(stream)
        if name not in vars(self._module):
            raise AssertionError(f"{self._path.name} defines no {name}; the contract asks for it")
        return vars(self._module)[name]


def neutral_state() -> None:
    """Sets torch's global state back to its defaults, whatever a learner's file did to it."""
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    if torch.are_deterministic_algorithms_enabled():  # The setter loads torch's compiler, for more than a second.
        torch.use_deterministic_algorithms(False)
    # Also where it is 1 already: else the first of a fork's threads that computes makes torch's pool anew, and another
    # one that computes at that moment fails.
    torch.set_num_threads(1)
    seed(0)


def seed(number: int) -> None:
    """Seeds torch's CPU stream: torch.manual_seed without its slow notes to devices that are not there."""
    torch.default_generator.manual_seed(number)


def fill(*layers: nn.Linear) -> None:
    """Gives layers of a submission weights of the check's choosing, whatever they were initialised with.

    Raises:
        AssertionError: one is no plain nn.Linear.
    """
    rng = torch.Generator().manual_seed(1)
    for layer in layers:
        for parameter in _parameters(layer):
            bound = layer.in_features**-0.5
            values = (torch.rand(parameter.shape, generator=rng, dtype=torch.float64) * 2 - 1) * bound
            with torch.no_grad():
                parameter.copy_(values)


def plain(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a given layer in float64, as its parameters hold them.

    Raises:
        AssertionError: it is another kind of layer, its parameters are not what is read, or weights have vanished.
    """
    weight, bias = (parameter.detach().double() for parameter in _parameters(layer))
    assert weight.norm(dim=1).min() > 1e-3, f"a given layer's weights came to nothing: {layer}"
    return weight, bias


def _parameters(layer: nn.Linear) -> list[nn.Parameter]:
    kind = type(layer)
    assert kind is nn.Linear, f"a {kind.__name__} came where a given nn.Linear was wanted"
    held = [vars(layer)["_parameters"].get(name) for name in ("weight", "bias")]
    for name, parameter in zip(("weight", "bias"), held, strict=True):
        assert type(parameter) is nn.Parameter and name not in vars(layer), (
            f"a given layer's {name} is no plain nn.Parameter of its own"
        )
    hooks = [name for name, value in vars(layer).items() if name.endswith("hooks") and value]
    assert not hooks, f"a given layer has hooks: {', '.join(hooks)}"
    return held
