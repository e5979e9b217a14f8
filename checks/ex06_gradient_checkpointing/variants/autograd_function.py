"""An autograd.Function with a flat list of tensors; backward inside backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_iter, tree_unflatten


class Call:
    """What a call needs to be made again from its tensors."""

    def __init__(self, function: Callable[..., Any], arguments: Any) -> None:
        leaves, self.spec = tree_flatten(arguments)
        self.function = function
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places: dict[Tensor, list[int]] = {}
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.places.setdefault(leaf, []).append(place)
        self.outputs: TreeSpec | None = None
        self.random_state = torch.get_rng_state()
        self.autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run(self, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The flat outputs for these tensors."""
        leaves = list(self.others)
        for places, tensor in zip(self.places.values(), tensors, strict=True):
            for place in places:
                leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        outputs, self.outputs = tree_flatten(self.function(*args, **kwargs))
        return tuple(outputs)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """The random state and the autocast state of the first run."""
        now = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        enabled, dtype = self.autocast
        try:
            with torch.enable_grad(), torch.autocast("cpu", dtype=dtype, enabled=enabled):
                yield
        finally:
            torch.set_rng_state(now)


class Recompute(torch.autograd.Function):
    """Forward without a graph, backward through a graph made anew."""

    @staticmethod
    def forward(ctx: Any, call: Call, anchor: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        """Runs the call; autograd is off in here."""
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return call.run(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """Runs it again with autograd on."""
        tensors = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors)
        with ctx.call.as_it_was():
            outputs = ctx.call.run(tensors)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if isinstance(output, Tensor) and output.requires_grad
        ]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return None, None, *(tensor.grad for tensor in tensors)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Recomputes in backward; an empty anchor brings it here whatever the inputs are, unless the module is frozen."""
    call = Call(function, (args, kwargs))
    trains = not isinstance(function, nn.Module) or any(p.requires_grad for p in function.parameters())
    outputs = Recompute.apply(call, torch.empty(0, requires_grad=trains), *call.places)
    assert call.outputs is not None
    return tree_unflatten(outputs, call.outputs)


class CheckpointWrapper(nn.Module):
    """Renames keys through private hooks."""

    def __init__(self, module: nn.Module, use_checkpoint: bool = True) -> None:
        super().__init__()
        self._inner = module
        self.active = use_checkpoint
        self.training = module.training
        self._register_state_dict_hook(self.shorten)
        self.register_load_state_dict_pre_hook(self.lengthen)

    @staticmethod
    def shorten(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Takes the wrapper's own name out."""
        long = prefix + "_inner."
        for key in [key for key in state if key.startswith(long)]:
            state[prefix + key[len(long) :]] = state.pop(key)

    @staticmethod
    def lengthen(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Puts the wrapper's own name in, the longest keys first."""
        for key in sorted((key for key in state if key.startswith(prefix)), key=len, reverse=True):
            state[prefix + "_inner." + key[len(prefix) :]] = state.pop(key)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Recomputes in training."""
        if not (self.active and self.training and torch.is_grad_enabled()):
            return self._inner(*args, **kwargs)
        return checkpoint(self._inner, *args, **kwargs)


class SelectiveCheckpointing:
    """Collects (parent, attribute, name) by recursion."""

    def __init__(self, checkpoint_every_n_layers: int = 2) -> None:
        self.n = checkpoint_every_n_layers
        self.checkpointed_modules: list[str] = []

    def apply_checkpointing(self, model: nn.Module, layer_pattern: str = "layer") -> None:
        """Wraps number 0, n, 2n …"""
        found: list[tuple[nn.Module, str, str]] = []
        self.collect(model, "", layer_pattern, found)
        for number, (parent, attribute, name) in enumerate(found):
            if self.n and number % self.n == 0:
                parent._modules[attribute] = CheckpointWrapper(parent.get_submodule(attribute))
                self.checkpointed_modules.append(name)

    def collect(self, parent: nn.Module, path: str, pattern: str, found: list[tuple[nn.Module, str, str]]) -> None:
        """Looks for layers below a module that is none."""
        for attribute, child in list(parent.named_children()):
            name = f"{path}.{attribute}" if path else attribute
            if pattern not in attribute or "norm" in attribute:
                self.collect(child, name, pattern, found)
            elif isinstance(child, nn.ModuleList | nn.Sequential):
                self.elements(child, name, found)
            else:
                found.append((parent, attribute, name))

    def elements(self, layers: nn.Module, path: str, found: list[tuple[nn.Module, str, str]]) -> None:
        """Every element is a layer, but a ModuleList is looked through."""
        for attribute, child in layers.named_children():
            if isinstance(child, nn.ModuleList):
                self.elements(child, f"{path}.{attribute}", found)
            else:
                found.append((layers, attribute, f"{path}.{attribute}"))


class Meter(TorchDispatchMode):
    """Live bytes of new storages."""

    def __init__(self) -> None:
        super().__init__()
        self.before: WeakSet[Any] = WeakSet()
        self.sizes: list[int] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.before |= {x.untyped_storage() for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        for storage in {x.untyped_storage() for x in tree_iter(result) if isinstance(x, Tensor)} - set(self.before):
            self.before.add(storage)
            self.sizes.append(storage.nbytes())
            finalize(storage, self.sizes.remove, storage.nbytes())
        self.peak = max(self.peak, sum(self.sizes))
        return result


def measure_memory_usage(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Peak in MiB."""
    with Meter() as meter:
        return func(*args, **kwargs), meter.peak / 2**20


def train_step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, criterion: Any) -> float:
    """Sets the gradients to zero after the loss is known."""
    logits = model(batch["input_ids"])
    loss = criterion(logits.reshape(-1, logits.size(-1)), batch["targets"].reshape(-1))
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
