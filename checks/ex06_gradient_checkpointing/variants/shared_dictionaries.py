"""The wrapper shares its module's dictionaries, so all names stay; its recomputation stops early and is kept."""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Enough(Exception):
    """Everything that backward needs has been computed again."""


class Frame:
    """The saved tensors of one call, by number."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.function = function
        twins = {
            id(x): x.detach().requires_grad_(x.requires_grad) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)
        }
        self.inputs = tree_map(lambda x: twins.get(id(x), x), (args, kwargs))
        self.state = torch.random.get_rng_state()
        self.autocast = torch.autocast("cpu", torch.get_autocast_cpu_dtype(), torch.is_autocast_cpu_enabled())
        self.wanted = 0
        self.values: dict[int, Tensor] = {}

    def pack(self, _: Tensor) -> int:
        """A number in place of a tensor."""
        self.wanted += 1
        return self.wanted - 1

    def unpack(self, number: int) -> Tensor:
        """The tensor of a number."""
        if number not in self.values:
            self.recompute()
        return self.values[number]

    def recompute(self) -> None:
        """Runs the function until the last saved tensor has been seen."""
        seen: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            seen.append(tensor.detach())
            if len(seen) == self.wanted:
                raise Enough
            return tensor.detach()

        args, kwargs = self.inputs
        now = torch.random.get_rng_state()
        torch.random.set_rng_state(self.state)
        try:
            with torch.enable_grad(), self.autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                self.function(*args, **kwargs)
        except Enough:
            pass
        finally:
            torch.random.set_rng_state(now)
        self.values = dict(enumerate(seen))


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Numbers in place of saved tensors."""
    frame = Frame(function, args, kwargs)
    with torch.autograd.graph.saved_tensors_hooks(frame.pack, frame.unpack):
        return function(*args, **kwargs)


class CheckpointWrapper(nn.Module):
    """Has its module's parameters, buffers and children for its own."""

    hidden: nn.Module

    def __init__(self, module: nn.Module, use_checkpoint: bool = True) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = module.__dict__[name]
        self.__dict__["hidden"] = module
        self.use_checkpoint = use_checkpoint
        self.training = module.training

    def train(self, mode: bool = True) -> "CheckpointWrapper":
        """Both, and the children."""
        self.hidden.train(mode)
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Recomputes in training only."""
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(self.hidden, *args, **kwargs)
        return self.hidden(*args, **kwargs)


class SelectiveCheckpointing:
    """A generator over slots."""

    def __init__(self, checkpoint_every_n_layers: int = 2) -> None:
        self.checkpoint_every_n_layers = checkpoint_every_n_layers
        self.checkpointed_modules: list[str] = []

    def apply_checkpointing(self, model: nn.Module, layer_pattern: str = "layer") -> None:
        """Wraps."""
        n = self.checkpoint_every_n_layers
        for number, (name, parent, key) in enumerate(list(slots(model, layer_pattern, ""))):
            if n > 0 and number % n == 0:
                parent._modules[key] = CheckpointWrapper(parent.get_submodule(key))
                self.checkpointed_modules += [name]


def slots(module: nn.Module, pattern: str, path: str, listed: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, parent and key of every layer."""
    for key, child in module._modules.items():
        if child is None:
            continue
        hit = listed or (pattern in key and "norm" not in key)
        through = isinstance(child, nn.ModuleList) or (not listed and isinstance(child, nn.Sequential))
        if hit and not through:
            yield path + key, module, key
        else:
            yield from slots(child, pattern, path + key + ".", hit)


class Live(TorchDispatchMode):
    """Live bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: WeakSet[Any] = WeakSet()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor):
                self.seen.add(leaf.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self.seen:
                size = leaf.untyped_storage().nbytes()
                self.seen.add(leaf.untyped_storage())
                self.now += size
                finalize(leaf.untyped_storage(), self.less, size)
        self.most = max(self.most, self.now)
        return out

    def less(self, size: int) -> None:
        """A storage is gone."""
        self.now -= size


def measure_memory_usage(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Peak in MiB."""
    live = Live()
    live.__enter__()
    try:
        result = func(*args, **kwargs)
    finally:
        live.__exit__(None, None, None)
    return result, live.most / 2**20


def train_step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, criterion: Any) -> float:
    """One step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    loss = criterion(model(batch["input_ids"]).flatten(end_dim=1), batch["targets"].flatten())
    torch.autograd.backward(loss)
    optimizer.step()
    return float(loss)
