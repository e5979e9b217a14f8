"""A Function class for every call, its inner backward under the outer one's autocast; the wrapper lends attributes."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function`, keeps only its inputs, and computes it a second time when backward needs what was forgotten."""
    replay = _States()
    leaves, spec = tree_flatten((args, kwargs))
    tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())
    trains = not isinstance(function, nn.Module) or any(p.requires_grad for p in function.parameters())
    forms: list[Any] = []

    def run(given: Any) -> tuple[Any, ...]:
        twins = dict(zip(map(id, tensors), given, strict=True))
        again = [twins.get(id(leaf), leaf) for leaf in leaves]
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

    flat = Rerun.apply(torch.empty(0, requires_grad=trains), *tensors)
    return tree_unflatten(flat, forms[0])


class _States:
    """The random state and the autocast states of a moment."""

    def __init__(self) -> None:
        self.random_state = torch.get_rng_state()
        self.autocasts = [
            torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in ("cpu", "cuda")
        ]


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
