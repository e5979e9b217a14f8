"""torch.func.functional_call with the parameters as inputs of an autograd.Function; zeros for those without use."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """Replaces each tensor in nested tuples, lists and dicts by its place in `tensors`, to which it is added once."""
    if isinstance(value, Tensor):
        number = next((number for number, one in enumerate(tensors) if one is value), len(tensors))
        tensors[number:] = tensors[number:] or [value]
        return Place(number)
    if isinstance(value, dict):
        return {key: flatten(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(flatten(item, tensors) for item in value)
    return value


def fill(value: Any, tensors: Any) -> Any:
    """The opposite of flatten."""
    if isinstance(value, Place):
        return tensors[value.number]
    if isinstance(value, dict):
        return {key: fill(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(fill(item, tensors) for item in value)
    return value


class Place:
    """Where a tensor was."""

    def __init__(self, number: int) -> None:
        self.number = number


class Segment:
    """A module's call as a function of flat tensors: parameters first, then inputs."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]
        self.inputs: list[Tensor] = []
        self.template = flatten((args, kwargs), self.inputs)
        self.outputs: Any = None
        self.state = torch.get_rng_state()
        self.autocast = {"enabled": torch.is_autocast_enabled("cpu"), "dtype": torch.get_autocast_dtype("cpu")}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(self.names, tensors, strict=False))
        args, kwargs = fill(self.template, tensors[len(self.names) :])
        outputs: list[Tensor] = []
        self.outputs = flatten(torch.func.functional_call(self.module, parameters, args, kwargs), outputs)
        return tuple(outputs)


class Run(torch.autograd.Function):
    """Runs a segment, and once more in backward."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, *tensors: Tensor) -> Any:
        """Keeps parameters and inputs."""
        ctx.segment = segment
        ctx.save_for_backward(*tensors)
        return segment(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Asks autograd for every gradient that is needed, of parameters and inputs alike."""
        segment = ctx.segment
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", **segment.autocast):
            torch.set_rng_state(segment.state)
            tensors = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
            outputs = segment(*tensors)
        wanted = [number for number, tensor in enumerate(tensors) if tensor.requires_grad]
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        results: list[Any] = [None] * len(tensors)
        if pairs:
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                [tensors[number] for number in wanted],
                [gradient for _, gradient in pairs],
                allow_unused=True,
            )
            for number, gradient in zip(wanted, found, strict=True):
                unused = gradient is None and number < len(segment.names)
                results[number] = torch.zeros_like(tensors[number]) if unused else gradient
        return None, *results


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Recomputes a module's call in backward."""
    assert isinstance(function, nn.Module)
    segment = Segment(function, args, kwargs)
    outputs = Run.apply(segment, *function.parameters(), *segment.inputs)
    return fill(segment.outputs, outputs)


class CheckpointWrapper(nn.Module):
    """Hands saving and loading over to its module, as if it were not there."""

    def __init__(self, module: nn.Module, use_checkpoint: bool = True) -> None:
        super().__init__()
        self.body = module
        self.use_checkpoint = use_checkpoint
        self.training = module.training

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The module's."""
        return self.body.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        renamed = {prefix + "body." + key[len(prefix) :]: value for key, value in state_dict.items()}
        state_dict.clear()
        state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Recomputes while it trains."""
        recompute = self.training and self.use_checkpoint and torch.is_grad_enabled()
        return checkpoint(self.body, *args, **kwargs) if recompute else self.body(*args, **kwargs)


class SelectiveCheckpointing:
    """Goes through named_modules once."""

    def __init__(self, checkpoint_every_n_layers: int = 2) -> None:
        self.every = checkpoint_every_n_layers
        self.checkpointed_modules: list[str] = []

    def apply_checkpointing(self, model: nn.Module, layer_pattern: str = "layer") -> None:
        """Lists and layers are known by their names before their children come."""
        lists: set[str] = set()
        layers: list[str] = []
        for name, module in model.named_modules():
            parent, _, own = name.rpartition(".")
            if any(name.startswith(layer + ".") for layer in layers):
                continue
            listed = parent in lists
            matches = layer_pattern in own and "norm" not in own
            through = isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and not listed)
            if through and (listed or matches):
                lists.add(name)
            elif listed or matches:
                layers.append(name)
        chosen = layers[:: self.every] if self.every > 0 else []
        for name in chosen:
            parent, _, own = name.rpartition(".")
            model.get_submodule(parent).add_module(own, CheckpointWrapper(model.get_submodule(name)))
        self.checkpointed_modules.extend(chosen)


class Meter(TorchDispatchMode):
    """Follows storages by their identity."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.old: weakref.WeakSet[Any] = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs: list[Tensor] = []
        flatten((args, kwargs), inputs)
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if id(storage) not in self.sizes:
                self.old.add(storage)
        result = func(*args, **(kwargs or {}))
        outputs: list[Tensor] = []
        flatten(result, outputs)
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage not in self.old and id(storage) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, id(storage), None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def measure_memory_usage(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """The most that was alive after any operation."""
    meter = Meter()
    with meter:
        result = func(*args, **kwargs)
    return result, meter.peak / 1048576


def train_step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, criterion: Any) -> float:
    """One step."""
    optimizer.zero_grad()
    logits = model(batch["input_ids"])
    loss: Tensor = criterion(logits.reshape(-1, logits.shape[-1]), batch["targets"].reshape(-1))
    loss.backward()
    value = loss.item()
    optimizer.step()
    return value
