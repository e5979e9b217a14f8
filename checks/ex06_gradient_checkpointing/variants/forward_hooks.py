"""Nothing is wrapped: hooks around forward save markers; the optimizer gets a closure, the meter sweeps storages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only


class Marker:
    """Stands for one saved tensor."""


class Segment:
    """One call; what it saved lives as long as the markers of it do."""

    def __init__(self, again: Callable[..., Any], args: Any, kwargs: Any) -> None:
        twins: dict[int, Tensor] = {}

        def twin(x: Tensor) -> Tensor:
            return twins.setdefault(id(x), x.detach().requires_grad_(x.requires_grad))

        self.again = again
        self.args, self.kwargs = tree_map_only(Tensor, twin, args), tree_map_only(Tensor, twin, kwargs)
        self.state = torch.default_generator.get_state()
        self.autocast: dict[str, Any] = {
            "enabled": torch.is_autocast_enabled("cpu"),
            "dtype": torch.get_autocast_dtype("cpu"),
        }
        self.order: list[ref[Marker]] = []
        self.found: WeakKeyDictionary[Marker, Tensor] = WeakKeyDictionary()

    def pack(self, _: Tensor) -> Marker:
        """A new marker."""
        marker = Marker()
        self.order.append(ref(marker))
        return marker

    def unpack(self, marker: Marker) -> Tensor:
        """What a marker stands for."""
        if marker not in self.found:
            for one, tensor in zip(self.order, self.recomputed(), strict=True):
                if (alive := one()) is not None:
                    self.found[alive] = tensor
        return self.found.pop(marker)

    def recomputed(self) -> list[Tensor]:
        """Everything that autograd saves the second time."""
        values: list[Tensor] = []
        now = torch.default_generator.get_state()
        torch.default_generator.set_state(self.state)
        try:
            with (
                saved_tensors_hooks(lambda tensor: values.append(tensor.detach()), lambda _: torch.empty(0)),
                torch.autocast("cpu", **self.autocast),
                torch.enable_grad(),
            ):
                self.again(*self.args, **self.kwargs)
        finally:
            torch.default_generator.set_state(now)
        return values


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Markers in place of saved tensors."""
    segment = Segment(function, args, kwargs)
    with saved_tensors_hooks(segment.pack, segment.unpack):
        return function(*args, **kwargs)


class CheckpointWrapper(nn.Module):
    """Saves and loads by its module's own methods."""

    def __init__(self, module: nn.Module, use_checkpoint: bool = True) -> None:
        super().__init__()
        self.wrapped = module
        self.use_checkpoint = use_checkpoint
        self.training = module.training

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.wrapped.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for key in reversed(sorted(state_dict, key=len)):
            if key.startswith(prefix):
                state_dict[f"{prefix}wrapped.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hooks' work in one place."""
        if not all((self.use_checkpoint, self.training, torch.is_grad_enabled())):
            return self.wrapped(*args, **kwargs)
        return checkpoint(self.wrapped, *args, **kwargs)


class Hooks:
    """Before and after a layer's forward, but not in its second computation."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.open: list[saved_tensors_hooks | None] = []
        self.paused = False
        layer.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
        layer.register_forward_hook(self.after, always_call=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """For the second computation."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def again(self, *args: Any, **kwargs: Any) -> None:
        """The second computation."""
        with self.pause():
            self.layer(*args, **kwargs)

    def before(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Opens a segment."""
        if self.paused or not layer.training or not torch.is_grad_enabled():
            self.open.append(None)
            return
        segment = Segment(self.again, args, kwargs)
        hooks = saved_tensors_hooks(segment.pack, segment.unpack)
        hooks.__enter__()
        self.open.append(hooks)

    def after(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Closes it."""
        hooks = self.open.pop()
        if hooks is not None:
            hooks.__exit__()


class SelectiveCheckpointing:
    """Names come from a property, as a tuple."""

    def __init__(self, checkpoint_every_n_layers: int = 2) -> None:
        self.n = checkpoint_every_n_layers
        self.hooks: dict[str, Hooks] = {}

    @property
    def checkpointed_modules(self) -> tuple[str, ...]:
        """The layers that have hooks."""
        return tuple(self.hooks)

    def apply_checkpointing(self, model: nn.Module, layer_pattern: str = "layer") -> None:
        """Counts down to the next layer."""
        wait = 0
        for name, layer in layers(model, "", layer_pattern):
            if self.n and wait == 0:
                self.hooks[name] = Hooks(layer)
                wait = self.n
            wait -= 1


def layers(module: nn.Module, prefix: str, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """All layers below a module that is none."""
    for key, child in module.named_children():
        if pattern not in key or "norm" in key:
            yield from layers(child, f"{prefix}{key}.", pattern)
        elif isinstance(child, nn.ModuleList | nn.Sequential):
            yield from elements(child, f"{prefix}{key}.")
        else:
            yield prefix + key, child


def elements(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The elements of a list, and of the lists in it."""
    for key, child in module.named_children():
        yield from elements(child, f"{prefix}{key}.") if isinstance(child, nn.ModuleList) else [(prefix + key, child)]


class Sweep(TorchDispatchMode):
    """Adds up what is alive after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.old: WeakSet[Any] = WeakSet()
        self.new: WeakSet[Any] = WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in storages((args, kwargs)):
            if storage not in self.new:
                self.old.add(storage)
        result = func(*args, **(kwargs or {}))
        self.new |= {storage for storage in storages(result) if storage not in self.old}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.new))
        return result


def storages(values: Any) -> Iterator[Any]:
    """The storages of the tensors in nested values."""
    return (leaf.untyped_storage() for leaf in tree_iter(values) if isinstance(leaf, Tensor))


def measure_memory_usage(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Peak in MiB."""
    sweep = Sweep()
    with sweep:
        result = func(*args, **kwargs)
    return result, sweep.peak / 1024 / 1024


def train_step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, criterion: Any) -> float:
    """All of it in the optimizer's closure."""
    losses: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        logits = model(batch["input_ids"])
        loss = criterion(logits.reshape(-1, logits.size(-1)), batch["targets"].reshape(-1))
        loss.backward()
        losses.append(loss.item())
        return losses[0]

    optimizer.step(closure)
    return losses[0]
