"""Layers get another forward, none is replaced; the graph keeps what is recomputed; the profiler measures memory."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Closures for hooks."""
    twins: dict[Tensor, Tensor] = {}
    kept, kept_kwargs = _twins(args, twins), _twins(kwargs, twins)
    random_state, enabled, dtype = (
        torch.get_rng_state(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )
    count, values = [0], list[Tensor]()

    def pack(tensor: Tensor) -> int:
        count[0] += 1
        return count[0] - 1

    def recompute() -> None:
        with (
            torch.random.fork_rng(devices=()),
            torch.enable_grad(),
            torch.autocast("cpu", dtype=dtype, enabled=enabled, cache_enabled=False),
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: values.append(tensor.detach()), lambda _: torch.empty(0)
            ),
        ):
            torch.set_rng_state(random_state)
            function(*kept, **kept_kwargs)

    def unpack(number: int) -> Tensor:
        if not values:
            recompute()
        return values[number]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(*args, **kwargs)


def _twins(values: Any, twins: dict[Tensor, Tensor]) -> Any:
    def twin(x: Tensor) -> Tensor:
        if x not in twins:
            twins[x] = x.detach().requires_grad_(x.requires_grad)
        return twins[x]

    return tree_map_only(Tensor, twin, values)


class CheckpointWrapper(nn.Module):
    """Hides its module in a list, and registers the module's parts under their own names."""

    def __init__(self, module: nn.Module, use_checkpoint: bool = True) -> None:
        super().__init__()
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._modules = module._modules
        self.training = module.training
        self.hidden = [module]
        self.run = recomputed(module, module.forward) if use_checkpoint else module.forward

    def train(self, mode: bool = True) -> "CheckpointWrapper":
        """The hidden module's flag goes along."""
        self.hidden[0].train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The recomputed forward."""
        return self.run(*args, **kwargs)


def recomputed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is checkpointed while the module trains."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if module.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, **kwargs)
        return forward(*args, **kwargs)

    return run


class SelectiveCheckpointing:
    """Patches the forward of every n-th layer."""

    def __init__(self, checkpoint_every_n_layers: int = 2) -> None:
        self.n = checkpoint_every_n_layers
        self.checkpointed_modules: list[str] = []

    def apply_checkpointing(self, model: nn.Module, layer_pattern: str = "layer") -> None:
        """Patches."""
        layers: dict[str, nn.Module] = {}
        stack = [(name, child, False) for name, child in reversed(list(model.named_children()))]
        while stack:
            name, module, listed = stack.pop()
            own = name.rpartition(".")[2]
            hit = listed or (layer_pattern in own and "norm" not in own)
            if hit and not isinstance(module, nn.ModuleList) and (listed or not isinstance(module, nn.Sequential)):
                layers[name] = module
            else:
                children = [(f"{name}.{key}", child, hit) for key, child in module.named_children()]
                stack.extend(reversed(children))
        for name in list(layers)[:: self.n or len(layers) + 1] if self.n else []:
            vars(layers[name])["forward"] = recomputed(layers[name], layers[name].forward)
            self.checkpointed_modules.append(name)


def measure_memory_usage(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Adds up the profiler's allocations and releases in time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = func(*args, **kwargs)
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return result, peak / 1024**2


def train_step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, criterion: Any) -> float:
    """One step, in training mode."""
    model.train()
    optimizer.zero_grad(set_to_none=True)
    logits = model(batch["input_ids"])
    loss = criterion(logits.reshape(-1, logits.size(2)), batch["targets"].reshape(-1))
    loss.backward()
    optimizer.step()
    return loss.detach().item()
