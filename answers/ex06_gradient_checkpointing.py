"""The answer to ex06, Gradient checkpointing."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function`, keeps only its inputs, and computes it a second time when backward needs what was forgotten.

    Args:
        function: the module to call.
        args: its arguments: anything, also nested structures with tensors.
        kwargs: its keyword arguments, likewise.

    Returns:
        What `function` returns.
    """
    replay = _Replay(function, args, kwargs)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        return function(*args, **kwargs)


class _Replay:
    """A call that can be made again as it was; numbers stand in for the tensors that autograd saves for backward."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function = function
        # A tensor that comes twice is one tensor again: attention takes a shorter way if its key is its query.
        twins: dict[int, Tensor] = {}
        self.args, self.kwargs = tree_map_only(Tensor, lambda x: twins.setdefault(id(x), _detached(x)), (args, kwargs))
        self.random_state = torch.get_rng_state()
        # Asking CUDA for its states would start it where it is not in use.
        self.cuda_random_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.autocasts = [
            torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in ("cpu", "cuda")
        ]
        self.numbers = itertools.count()
        self.recomputed: dict[int, Tensor] = {}

    def pack(self, _: Tensor) -> int:
        return next(self.numbers)

    def unpack(self, number: int) -> Tensor:
        # What is taken out is gone, so a second backward computes it again.
        if number not in self.recomputed:
            self.recomputed = dict(enumerate(self.saved_tensors()))
        return self.recomputed.pop(number)

    def saved_tensors(self) -> list[Tensor]:
        """Makes the call again; returns the tensors that autograd saves, in the order in which they were packed."""
        saved: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=range(len(self.cuda_random_states))))
            torch.set_rng_state(self.random_state)
            torch.cuda.set_rng_state_all(self.cuda_random_states)
            for autocast in self.autocasts:
                stack.enter_context(autocast)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), _never_unpacked))
            self.function(*self.args, **self.kwargs)
        return saved


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _never_unpacked(_: None) -> Tensor:
    raise RuntimeError("backward ran through a recomputation")


class CheckpointWrapper(nn.Module):
    """A module that keeps only its inputs for backward, and is computed a second time there.

    Args:
        module: the module to wrap; its training flag becomes the wrapper's.
        use_checkpoint: False makes the wrapper call its module and do nothing else.
    """

    def __init__(self, module: nn.Module, use_checkpoint: bool = True) -> None:
        super().__init__()
        self.module = module
        self.use_checkpoint = use_checkpoint
        self.training = module.training
        self.register_state_dict_post_hook(_remove_own_name)
        self.register_load_state_dict_pre_hook(_insert_own_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with whatever comes; recomputes in backward only while training with gradients enabled.

        Args:
            args: the module's arguments.
            kwargs: the module's keyword arguments.

        Returns:
            What the module returns.
        """
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
    """Wraps every n-th layer of a model.

    Args:
        checkpoint_every_n_layers: n; 1 wraps every layer, 2 every second one, 0 none.

    Attributes:
        checkpointed_modules: dotted names of the layers that are wrapped, in the model's order; empty at first.
    """

    def __init__(self, checkpoint_every_n_layers: int = 2) -> None:
        self.checkpoint_every_n_layers = checkpoint_every_n_layers
        self.checkpointed_modules: list[str] = []

    def apply_checkpointing(self, model: nn.Module, layer_pattern: str = "layer") -> None:
        """Wraps the layers number 0, n, 2n … of `model`, in place.

        Args:
            model: any model; it is changed.
            layer_pattern: what the attribute name of a layer, or of a list of layers, contains.
        """
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
    """Calls `func(*args, **kwargs)` and measures the tensor memory that it needs.

    Args:
        func: what to measure.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        What `func` returns, and the most MiB of tensor storage allocated inside that was alive at once.
    """
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
    """Makes one step of training: forward, backward, the optimizer's step; old gradients go before backward.

    Args:
        model: gives logits [B, L, V] for input ids [B, L]; it is in training mode.
        batch: "input_ids" and "targets", int64 [B, L].
        optimizer: over the model's parameters.
        criterion: gives the loss for logits [B·L, V] and targets [B·L].

    Returns:
        The loss before the step, as a Python float.
    """
    optimizer.zero_grad()
    logits = model(batch["input_ids"])  # [B, L, V]
    loss = criterion(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


class MemoryEfficientTransformer(nn.Module):
    """Given; no need to change. A small language model: embedding, encoder layers, and a head.

    Args:
        vocab_size: number of tokens V.
        d_model: number of features.
        num_layers: number of encoder layers.
        num_heads: number of attention heads of a layer.
        dropout: probability of every dropout of a layer.
    """

    def __init__(
        self, vocab_size: int, d_model: int = 64, num_layers: int = 8, num_heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, num_heads, 4 * d_model, dropout, batch_first=True)
            for _ in range(num_layers)
        )
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits for every position.

        Args:
            input_ids: int64 [B, L].

        Returns:
            [B, L, V].
        """
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_gradient_checkpointing() -> None:
    """Your own test of this file: passes on right code, fails on each slip listed above."""
    torch.manual_seed(0)
    input_ids = torch.randint(11, (2, 5))
    plain = MemoryEfficientTransformer(11, d_model=8, num_layers=3, num_heads=2, dropout=0.5)
    wrapped = copy.deepcopy(plain)
    entered: Counter[nn.Module] = Counter()
    for layer in wrapped.layers:
        layer.get_submodule("linear1").register_forward_pre_hook(lambda module, _: entered.update([module]))
    selective = SelectiveCheckpointing(1)
    selective.apply_checkpointing(wrapped)
    assert selective.checkpointed_modules == ["layers.0", "layers.1", "layers.2"]
    wrapped.load_state_dict(plain.state_dict())

    gradients, streams = [], []
    for model in (plain, wrapped):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids)
        logits.square().mean().backward()
        gradients.append({name: value.grad for name, value in model.state_dict(keep_vars=True).items()})
        streams.append(torch.get_rng_state())
    assert list(entered.values()) == [2, 2, 2], f"entered in a training step: {list(entered.values())}"
    assert all(gradient is not None for gradient in gradients[1].values()), "a parameter has no gradient"
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch.equal(streams[1], streams[0]), "the random stream is elsewhere after a step"

    entered.clear()
    wrapped.eval()(input_ids).sum().backward()
    assert list(entered.values()) == [1, 1, 1], f"entered in eval: {list(entered.values())}"

    encoder_layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    causal = torch.full((5, 5), float("-inf")).triu(1)
    x = torch.randn(2, 5, 8)
    results = []
    for module in (encoder_layer, CheckpointWrapper(encoder_layer)):
        leaf = x.clone().requires_grad_()
        module(leaf, src_mask=causal).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0])

    _, peak = measure_memory_usage(lambda: torch.zeros(2**18) + 1 - 2)
    assert 1.9 < peak < 2.1, f"x + 1 - 2 for 1 MiB has a peak of 2 MiB; {peak} was measured"
