"""A Function class for every call, its inner backward under the forward's autocast; the wrapper lends attributes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function`, keeps only its inputs, and computes it a second time when backward needs what was forgotten."""
    replay = _States()
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    forms: list[Any] = []

    def run(given: Any) -> tuple[Any, ...]:
        tensors_left = iter(given)
        again = [next(tensors_left) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        new_args, new_kwargs = tree_unflatten(again, spec)
        outputs, form = tree_flatten(function(*new_args, **new_kwargs))
        forms.append(form)
        return tuple(outputs)

    class Rerun(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, anchor: Any, *given: Tensor) -> Any:
            ctx.save_for_backward(*given)
            return run(given)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            given = [_detached(tensor) for tensor in ctx.saved_tensors]
            with ExitStack() as stack:
                stack.enter_context(torch.random.fork_rng(devices=[]))
                torch.set_rng_state(replay.random_state)
                for autocast in replay.autocasts:
                    stack.enter_context(autocast)
                stack.enter_context(torch.enable_grad())
                outputs = run(given)
                each = zip(outputs, gradients, strict=True)
                pairs = [(o, g) for o, g in each if isinstance(o, Tensor) and o.requires_grad]
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            return None, *(tensor.grad for tensor in given)

    flat = Rerun.apply(torch.empty(0, requires_grad=True), *tensors)
    return tree_unflatten(flat, forms[0])


class _States:
    """The random state and the autocast states of a moment."""

    def __init__(self) -> None:
        self.random_state = torch.get_rng_state()
        self.autocasts = [
            torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in ("cpu", "cuda")
        ]


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


class CheckpointWrapper(nn.Module):
    """A module that keeps only its inputs for backward, and is computed a second time there."""

    def __init__(self, module: nn.Module, use_checkpoint: bool = True) -> None:
        super().__init__()
        self.module = module
        self.use_checkpoint = use_checkpoint
        self.training = module.training
        self.register_state_dict_post_hook(_remove_own_name)
        self.register_load_state_dict_pre_hook(_insert_own_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with whatever comes; recomputes in backward only while training with gradients enabled."""
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(self.module, *args, **kwargs)
        return self.module(*args, **kwargs)


def _remove_own_name(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state_dict, f"{prefix}module.", prefix)


def _insert_own_name(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state_dict, prefix, f"{prefix}module.")


def _rename(state_dict: dict[str, Any], old: str, new: str) -> None:
    # All come out before the first goes in: the wrapped module may have a child that is called "module" too.
    taken = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(old)}
    state_dict.update({new + key.removeprefix(old): value for key, value in taken.items()})


class SelectiveCheckpointing:
    """Wraps every n-th layer of a model."""

    def __init__(self, checkpoint_every_n_layers: int = 2) -> None:
        self.checkpoint_every_n_layers = checkpoint_every_n_layers
        self.checkpointed_modules: list[str] = []

    def apply_checkpointing(self, model: nn.Module, layer_pattern: str = "layer") -> None:
        """Wraps the layers number 0, n, 2n … of `model`, in place."""
        if self.checkpoint_every_n_layers == 0:
            return
        for name in list(_layer_names(model, layer_pattern))[:: self.checkpoint_every_n_layers]:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, CheckpointWrapper(model.get_submodule(name)))
            self.checkpointed_modules.append(name)


def _layer_names(module: nn.Module, pattern: str, prefix: str = "", in_list: bool = False) -> Iterator[str]:
    for attribute, child in module.named_children():
        name = prefix + attribute
        matches = in_list or (pattern in attribute and "norm" not in attribute)
        is_list = isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and not in_list)
        if matches and not is_list:
            yield name
        else:
            yield from _layer_names(child, pattern, f"{name}.", in_list=matches)


def measure_memory_usage(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Calls `func(*args, **kwargs)` and measures the tensor memory that it needs."""
    with _StorageMeter() as meter:
        result = func(*args, **kwargs)
    return result, meter.peak / 2**20


class _StorageMeter(TorchDispatchMode):
    """Counts the bytes of the storages that are made while it is on, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known: WeakSet[torch.UntypedStorage] = WeakSet()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.known.update(_storages((args, kwargs)))  # these existed before
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self.known:
                self.known.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                finalize(storage, self.freed, storage.nbytes())
        return result

    def freed(self, size: int) -> None:
        self.alive -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def train_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """Makes one step of training: old gradients off, forward, backward, the optimizer's step."""
    optimizer.zero_grad()
    logits = model(batch["input_ids"])  # [B, L, V]
    loss = criterion(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()
