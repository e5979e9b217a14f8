"""Notices what a submission replaced of torch, of Python or of the test runner: a verdict computed with it is void.

Only grading looks: it costs a few milliseconds per check.
"""

import builtins
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode

_MODULES = (
    *("harness", "_pytest", "pluggy", "asyncio.base_events", "asyncio.futures", "asyncio.tasks", "threading", "math"),
    *("time", "contextlib", "copy", "torch.nn.functional", "torch.nn.init", "torch.nn.modules", "torch.nn.parameter"),
    *("torch.autograd", "torch.linalg", "torch.testing", "torch._tensor", "torch.overrides", "torch.functional"),
    *("torch.utils._python_dispatch", "torch.utils.checkpoint", "torch.library", "torch.serialization"),
    *("os", "posix", "json", "dataclasses", "traceback", "inspect", "re", "functools", "tempfile", "signal"),
)
_CLASSES_OF = ("harness", "torch", "_pytest", "pluggy", "asyncio", "threading")
# What the comparison and the checks' own references compute with.
_KERNELS = (
    *("isclose", "all", "any", "eq.Tensor", "ne.Tensor", "le.Tensor", "gt.Tensor", "abs", "sub.Tensor", "add.Tensor"),
    *("mul.Tensor", "div.Tensor", "mm", "bmm", "exp", "_softmax", "where.self", "isnan", "_to_copy", "clone"),
    *("_local_scalar_dense", "equal", "normal_", "uniform_", "randint", "copy_"),
)
# What is looked at again and again while a check runs: it could be replaced for a moment.
_AT_ONCE = ("torch", "torch._C", "torch.functional", "torch.nn.functional", "torch.library", "torch.overrides")
_KERNELS_AT_ONCE = (
    "isclose",
    "all",
    "_local_scalar_dense",
    "eq.Tensor",
    "mm",
    "bmm",
    "mul.Tensor",
    "add.Tensor",
    "_softmax",
)
# A check's own stand-in for a device's autocast.
_STOOD_IN = "autocast"
# torch's name for the storage of the default dtype: whoever sets that dtype sets it too.
_FOLLOWS = "Storage"
_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


class Integrity:
    """What is there before a submission is loaded.

    Names, the bodies of functions, modes that stay on, hooks on all modules, and kernels: `changes` names those that
    are no longer what they were, `restore` brings back all but the kernels.
    """

    def __init__(self) -> None:
        self._owners = [(owner, _Names(owner)) for owner in _owners()]
        functions = {id(f): f for _, names in self._owners for value in names.values() for f in _functions(value)}
        self._bodies = [(function, function.__code__, function.__defaults__) for function in functions.values()]
        self._kernels = {name: _kernel(name) for name in _KERNELS}
        # Names what a submission has replaced right now of what judges it, or "".
        self.look = _look(self._kernels)

    def changes(self) -> list[str]:
        """What was replaced, in words for people: "torch.randn"."""
        found = [f"{_name(owner)}.{name}" for owner, name, _ in self._replaced()]
        found += [f"the body of {f.__qualname__}" for f, code, defaults in self._bodies if _altered(f, code, defaults)]
        found += [f"the kernel of aten::{name}" for name, kernel in self._kernels.items() if _kernel(name) != kernel]
        found += ["what all modules call (a global hook)"] * any(getattr(hooks, name) for name in _HOOKS)
        found += ["every torch call (a mode that stays on)"] * (_modes() > 0)
        return found

    def restore(self) -> None:
        """Puts back what `changes` finds, so that the next check begins as the first did."""
        for owner, name, value in list(self._replaced()):
            with suppress(AttributeError, TypeError):
                setattr(owner, name, value) if value is not None else delattr(owner, name)
        for function, code, defaults in self._bodies:
            if _altered(function, code, defaults):
                function.__code__, function.__defaults__ = code, defaults
        for name in _HOOKS:
            getattr(hooks, name).clear()
        while torch._C._len_torch_dispatch_stack():
            _pop_mode()
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()

    def _replaced(self) -> Iterator[tuple[Any, str, Any]]:
        """Owner, name and the value before (None: there was none) of each name that is another now or covers one."""
        for owner, names in self._owners:
            now = vars(owner)
            # By identity: what replaces something may say that it equals it.
            if tuple(map(id, map(now.get, names))) != names.ids:
                yield from ((owner, name, value) for name, value in names.items() if now.get(name) is not value)
            if len(now) != names.size:
                yield from ((owner, name, None) for name in now.keys() - names.all if _covers(owner, name))


class _Names(dict[str, Any]):
    """The callables and properties of a module or class by name; `all` names, how many there were."""

    def __init__(self, owner: Any) -> None:
        there = dict(vars(owner))
        kept = {name: value for name, value in there.items() if name != _FOLLOWS or owner is not torch}
        super().__init__((name, value) for name, value in kept.items() if callable(value) or _is_descriptor(value))
        self.all = frozenset(there)
        self.size = len(there)
        self.ids = tuple(map(id, self.values()))


def _look(kernels: dict[str, str]) -> Callable[[], str]:
    """A quick look at what judges. All that it needs it holds itself: nothing that is replaced changes what it sees."""
    modules = [module for name, module in list(sys.modules.items()) if name in _AT_ONCE or name.startswith("harness.")]
    ours = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith("harness.")
    ]
    classes = (torch.Tensor, torch.nn.Module, torch.nn.Linear, torch.nn.MultiheadAttention, torch.nn.Parameter)
    spaces = []
    for owner in (builtins, *modules, *dict.fromkeys([*ours, *classes])):
        names = _Names(owner)
        hidden = names.all | (_inherited(owner) if isinstance(owner, type) else frozenset(vars(builtins)))
        # To a class of ours nothing is added.
        names.pop(_STOOD_IN, None)
        ids = tuple(map(id, names.values()))
        spaces.append((_name(owner), vars(owner), tuple(names), ids, names.size, names.all, hidden, owner in ours))
    modes = frozenset(_subclasses(TorchFunctionMode) + _subclasses(TorchDispatchMode))
    lists = tuple(getattr(hooks, name) for name in _HOOKS)
    tables = tuple((f"aten::{name}", kernels[name]) for name in _KERNELS_AT_ONCE)
    length, kind, count, each, identity, listed = len, type, range, map, id, tuple
    dump = torch._C._dispatch_dump_table
    stacks = (
        (torch._C._len_torch_function_stack, torch._C._get_function_stack_at),
        (torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_stack_at),
    )

    def look() -> str:
        for name, space, names, ids, size, known, hidden, closed in spaces:
            if listed(each(identity, each(space.get, names))) != ids:
                for place in count(length(names)):
                    if identity(space.get(names[place])) != ids[place]:
                        return f"{name}.{names[place]}"
            if length(space) != size:
                for key in space:
                    if key not in known and (closed or (key in hidden and key[:2] != "__")):
                        return f"{name}.{key}"
        for name, table in tables:
            if dump(name) != table:
                return f"the kernel of {name}"
        for depth, at in stacks:
            for place in count(depth()):
                if kind(at(place)) not in modes:
                    return "every torch call (a mode that stays on)"
        for list_of_hooks in lists:
            if list_of_hooks:
                return "what all modules call (a global hook)"
        return ""

    return look


def _inherited(owner: type) -> frozenset[str]:
    """The names that a class inherits, but for object's."""
    return frozenset(name for base in owner.__mro__[1:] if base is not object for name in vars(base))


def _subclasses(kind: type) -> list[type]:
    """The judge's own classes of a kind."""
    direct: list[type] = type.__subclasses__(kind)
    found = [one for below in direct for one in (below, *_subclasses(below))]
    return [one for one in found if one.__module__.startswith(("harness.", "checks."))]


@cache
def before_submissions() -> Integrity:
    """What is there before any submission is loaded: looked up once, in the process whose forks load them."""
    return Integrity()


def _owners() -> list[Any]:
    modules = [torch, builtins]
    for name, module in list(sys.modules.items()):
        watched = name.startswith("checks.") or any(name == top or name.startswith(f"{top}.") for top in _MODULES)
        if watched and isinstance(module, types.ModuleType):
            modules.append(module)
    classes = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.partition(".")[0] in _CLASSES_OF
    }
    return [*modules, *classes.values()]


def _is_descriptor(value: Any) -> bool:
    return isinstance(value, (property, staticmethod, classmethod))


def _functions(value: Any) -> list[types.FunctionType]:
    inner = getattr(value, "__func__", value)
    return [inner] if isinstance(inner, types.FunctionType) else []


def _altered(function: types.FunctionType, code: types.CodeType, defaults: Any) -> bool:
    return function.__code__ is not code or function.__defaults__ is not defaults


def _covers(owner: Any, name: str) -> bool:
    """Whether a new name hides an inherited attribute or a builtin."""
    if isinstance(owner, type):
        return any(name in vars(base) for base in owner.__mro__[1:] if base is not object)
    return hasattr(builtins, name) and not name.startswith("__")


def _kernel(name: str) -> str:
    return torch._C._dispatch_dump_table(f"aten::{name}")


def _modes() -> int:
    return int(torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack())


def _name(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else str(owner.__name__)
