"""Deterministic costs of torch code, seen below autograd: bytes, the largest tensor, operations, calls. No clock."""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, finalize

from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "arange",
    "scalar_tensor",
)
_FACTORIES_LIKE = (
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    *(name for name in _FACTORIES if name.startswith("new_")),
)


class DispatchMode(TorchDispatchMode):
    """torch's mode that sees every operation, without its guard against compilation: nothing compiles here, and the
    guard doubles the cost of an operation.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Trace(DispatchMode):
    """Follows every storage that is made while it is on (`with Trace() as seen:`), for as long as the storage lives.

    Storages that were there before (inputs, parameters) do not count, nor do views. What is alive after the `with`
    block is still followed. A storage's elements are its bytes over the item size of the tensor that it was made for.

    Args:
        at_least: storages of fewer elements count neither in `peak_bytes` nor in `alive_bytes`.
        sources: tensors whose derivatives are watched: see `largest_from_sources`.

    Attributes:
        operations: how often each aten operation was dispatched, by name without overload: {"mm": 2}.
        elements: elements that each operation gave in all, by the same names: {"exp": 4096}.
        largest: elements of the largest storage made.
        largest_from_sources: elements of the largest storage made from `sources` and constants alone.
        peak_bytes: most bytes alive at once.
    """

    def __init__(self, at_least: int = 0, sources: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()
        self.largest = self.largest_from_sources = 0
        self.peak_bytes = self.alive_bytes = 0
        self._at_least = at_least
        # A storage's Python object lives as long as the storage itself: weak keys follow storages, not names.
        self._seen: WeakSet[UntypedStorage] = WeakSet()
        self._sourced: WeakKeyDictionary[UntypedStorage, bool] = WeakKeyDictionary()
        for source in sources:
            self._sourced[source.untyped_storage()] = True
        self._watches_sources = bool(self._sourced)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = every_tensor((*args, *kwargs.values()) if kwargs else args)
        for tensor in inputs:
            if (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
        result = func(*args, **kwargs)
        outputs = [result] if type(result) is Tensor else every_tensor((result,))
        name = func.overloadpacket.__name__
        self.operations[name] += 1
        self.elements[name] += sum([tensor.numel() for tensor in outputs])
        if self._watches_sources:
            self._derive(name, inputs, outputs)
        for tensor in outputs:
            if (storage := tensor.untyped_storage()) not in self._seen:
                self._follow(storage, _elements(tensor))
        return result

    def _derive(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Notes where the outputs come from, before they count as seen."""
        origin = self._origin(name, inputs)
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if origin is not None:
                self._sourced[storage] = origin
            else:
                self._sourced.pop(storage, None)
            if origin and (storage not in self._seen or name.endswith("_")):
                self.largest_from_sources = max(self.largest_from_sources, _elements(tensor))

    def _origin(self, name: str, inputs: list[Tensor]) -> bool | None:
        """True if made from sources and constants, False if from constants alone, None if anything else came in."""
        if name in _FACTORIES or name in _FACTORIES_LIKE:
            return False
        origins = [self._sourced.get(tensor.untyped_storage()) for tensor in inputs]
        if not origins or None in origins:
            return None
        return any(origins)

    def _follow(self, storage: UntypedStorage, elements: int) -> None:
        self._seen.add(storage)
        self.largest = max(self.largest, elements)
        if elements < self._at_least:
            return
        self.alive_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        finalize(storage, self._forget, storage.nbytes()).atexit = False

    def _forget(self, size: int) -> None:
        self.alive_bytes -= size

    def alive_after_collection(self) -> int:
        """Bytes alive once Python's reference cycles are gone."""
        if self.alive_bytes:
            gc.collect()
        return self.alive_bytes


def _elements(tensor: Tensor) -> int:
    """The elements that the whole storage of a tensor has room for."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def every_tensor(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among what an operation takes or gives, and in lists, tuples and dictionaries there. A tenth of the
    time of torch's own walk, on a path that every operation under a trace takes twice.
    """
    found: list[Tensor] = []
    for value in values:
        if type(value) is Tensor or isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += every_tensor(value)
        elif isinstance(value, dict):
            found += every_tensor(list(value.values()))
    return found


@contextmanager
def calls(*modules: nn.Module) -> Iterator[Counter[nn.Module]]:
    """Counts how often each module's forward is entered, by hooks that are removed afterwards."""
    counted: Counter[nn.Module] = Counter()

    def count(module: nn.Module, _: Any) -> None:
        counted[module] += 1

    handles = [module.register_forward_pre_hook(count) for module in modules]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()
