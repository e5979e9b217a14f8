"""What several check files of ex06 use: modules to wrap, plain and wrapped twins, and the comparison of gradients."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _pop_mode

from harness.testing import Close, Subject, calls, seed

B, L, D, V = 3, 5, 6, 11
NOTHING_TWICE = "a wrapped module is entered once, twice was wanted: nothing is computed a second time"
NO_GRADIENT = "an output without gradient came, one with a grad_fn was wanted: backward never reaches the module"
INPUTS = "inputs that need a gradient need one in the second computation too, and backward returns it"
ALIKE = "backward gives inputs and parameters alike theirs"
ADD_UP = "gradients add up in .grad; a backward neither clears nor replaces what is there"
Hint = str | Callable[[], str]


class Map(nn.Linear):
    """A linear map, initialised fast."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.normal_(0, 0.4)
            self.bias.normal_(0, 0.4)


class Block(nn.Module):
    """x + a small network with dropout. Entries are counted at `up`, which every way of calling a block reaches."""

    def __init__(self, p: float = 0.0, hidden: int = 7) -> None:
        super().__init__()
        self.up = Map(D, hidden)
        self.down = Map(hidden, D)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x))
        return x + self.down(functional.dropout(hidden, self.p, self.training) if self.p else hidden)


class Scale(nn.Module):
    """A number to multiply by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Unit(nn.Module):
    """A layer that costs next to nothing to build."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Scale()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.up(x))


class Stack(nn.Module):
    """A model over blocks, in a ModuleList `layers`."""

    def __init__(self, number: int, p: float = 0.0, hidden: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block(p, hidden) for _ in range(number))
        self.dropout = nn.Dropout(p)
        self.head = Map(D, V)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(x))


class Row(nn.Module):
    """Layers one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def seeded(build: Callable[[], Any], dtype: torch.dtype = torch.float64) -> Any:
    """A module in `dtype` with weights from a fixed seed."""
    seed(1)
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(torch.float32)


def ups(module: nn.Module) -> list[nn.Module]:
    """Where the entries of the blocks inside `module` are counted."""
    return [part.up for part in module.modules() if isinstance(part, Block | Unit)]


def tokens(rng: torch.Generator) -> Tensor:
    """Input ids."""
    return torch.randint(V, (B, L), generator=rng)


def wrap_layers(subject: Subject, model: nn.Module, n: int = 1, **options: str) -> Any:
    """Wraps every n-th layer of `model`; returns what did it."""
    selective = subject.SelectiveCheckpointing(n)
    selective.apply_checkpointing(model, **options)
    return selective


def gradients(model: nn.Module, plain: nn.Module, before: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    """A wrapped model's gradients by the plain model's names: by its state_dict, or `before` if its keys differ."""
    state = model.state_dict()
    if set(state) != set(plain.state_dict()):
        return {name: parameter.grad for name, parameter in before.items()}
    grads = {parameter.data_ptr(): parameter.grad for parameter in model.parameters()}
    return {name: grads.get(value.data_ptr()) for name, value in state.items()}


class Pair:
    """A plain model, and its twin whose every n-th layer is wrapped: the same steps for both, and the comparison."""

    def __init__(
        self, subject: Subject, build: Callable[[], Any], n: int = 1, dtype: torch.dtype = torch.float64
    ) -> None:
        self.subject, self.n = subject, n
        self.plain, self.wrapped = seeded(build, dtype), seeded(build, dtype)
        self.ups = ups(self.wrapped)
        self.before = dict(self.wrapped.named_parameters())
        wrap_layers(subject, self.wrapped, n)
        self.streams: list[Tensor] = []
        self.entered: list[int] = []

    def step(self, run: Callable[[Any], None]) -> None:
        """Runs a step on both, from the same seed, and notes where the random stream is then."""
        self.streams.clear()
        for model in (self.plain, self.wrapped):
            seed(5)
            with calls(*self.ups) as entered:
                run(model)
            self.streams.append(torch.get_rng_state())
            self.entered = [entered[up] for up in self.ups]
        assert max(entered.values(), default=0) > 1, f"training step: {nothing_twice(self.subject)}"

    def agree(self, close: Close, what: str, hint: Hint = "") -> None:
        """Every parameter of the wrapped model has the plain model's gradient."""
        came = gradients(self.wrapped, self.plain, self.before)
        for name, parameter in self.plain.named_parameters():
            one, wanted = came[name], parameter.grad
            reason = partial(self._reason, one, wanted, hint)
            same_gradient(close, one, wanted, f"{what}: gradient of {name}", reason, missing=self._missing)

    def _reason(self, came: Any, wanted: Any, hint: Hint) -> str:
        """What a gradient that differs points to."""
        exact = wanted.dtype == torch.float64 and came.shape == wanted.shape
        if exact and torch.allclose(came.to(wanted.dtype), wanted, 1e-3, 1e-3):
            return "values this near: something was computed or kept below float64"
        return ADD_UP if replaces_gradients(self.subject) else text(hint)

    def _missing(self) -> str:
        """What a gradient that lacks points to: the last wrapped layer gets its own whatever others pass on."""
        last = self.ups[:: self.n][-1]
        return INPUTS if any(parameter.grad is not None for parameter in last.parameters()) else ALIKE


def text(hint: Hint) -> str:
    """A hint in words, computed now if it has to be."""
    return hint if isinstance(hint, str) else hint()


def same_gradient(
    close: Close,
    came: Any,
    wanted: Tensor | None,
    what: str,
    hint: Hint = "",
    tolerance: float | None = None,
    missing: Hint = INPUTS,
) -> None:
    """The gradient is the wanted one; where none is wanted, zeros are as good. `hint` is for one that differs,
    `missing` for one that lacks.
    """
    if wanted is None:
        assert came is None or not came.any(), (
            f"{what}: one came, none was wanted\nwhat needs no gradient in the plain module gets none"
        )
        return
    assert came is not None, f"{what}: none came, one was wanted\n{text(missing)}"
    try:
        close(came, wanted, what, tolerance=tolerance)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{text(hint)}".rstrip()) from error


def nothing_twice(subject: Subject) -> str:
    """Why nothing was computed a second time: a wrapped module's output may carry no gradient."""
    with suppress(Exception):
        x = torch.ones(2, D, dtype=torch.float64).requires_grad_()
        if not subject.CheckpointWrapper(seeded(Block))(x).requires_grad:
            return NO_GRADIENT
    return NOTHING_TWICE


def replaces_gradients(subject: Subject) -> bool:
    """Whether a second step leaves its own gradient alone."""
    with suppress(Exception):
        block = seeded(Block)
        wrapper, x = subject.CheckpointWrapper(block), torch.ones(2, D, dtype=torch.float64)
        came = []
        for _ in range(2):
            wrapper(x).square().sum().backward()
            came.append(block.up.weight.grad.clone())
        return torch.allclose(came[1], came[0])
    return False


def run_backward(output: Tensor, what: str = "training step of a wrapped module") -> None:
    """Runs backward, if it has where to start."""
    assert output.requires_grad, f"{what}: {NO_GRADIENT}"
    output.backward()


def units(number: int) -> nn.ModuleList:
    """A list of layers."""
    return nn.ModuleList(Unit() for _ in range(number))


def tree(**children: nn.Module | None) -> Any:
    """A module with these children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def nested_wrapper(subject: Subject, *layers: nn.Module) -> Any:
    """A wrapper of a wrapper around wrapped layers in a row."""
    inner = nn.Sequential(*(subject.CheckpointWrapper(layer) for layer in layers))
    return subject.CheckpointWrapper(subject.CheckpointWrapper(inner))


def recomputes(subject: Subject, x: Tensor) -> None:
    """In training, with gradients, the same wrapper does compute twice."""
    block = seeded(Block)
    with calls(block.up) as entered:
        run_backward(subject.CheckpointWrapper(block)(x).sum(), "training step of a wrapper")
    assert entered[block.up] > 1, f"training step of a wrapper: {NOTHING_TWICE}"


class Precision(nn.Module):
    """A linear map that notes in which dtype each of its entries multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Map(D, D)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x @ x.mT).dtype)
        return torch.tanh(self.linear(x))


STATES = {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast(state: str) -> Any:
    """Autocast in a state, off too."""
    return torch.autocast("cpu", STATES[state] or torch.bfloat16, enabled=STATES[state] is not None)


def precision_step(module: Any, leaf: Tensor, forward: str, backward: str) -> None:
    """A step with forward and backward under their states."""
    with autocast(forward):
        output = module(leaf)
    with autocast(backward):
        output.float().square().sum().backward()


class Rich(nn.Module):
    """Takes and gives whatever there is; what it does with it is said by `mode`."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.memory = Map(D, D)

    def forward(self, x: Any, other: Any = None, mode: str = "plain", *, scale: float = 1.0, mask: Any = None) -> Any:
        if mode == "structures":
            first, rest = x
            a, (b, number) = rest["a"], rest["b"]
            number += isinstance(x, tuple) - isinstance(b, tuple)
            mixed = self.block(first * a) + number * self.memory(b[0])
            return {"out": [mixed, (torch.tanh(mixed), None)], "size": 7, "ok": True}
        hidden = self.block(x) * scale
        if other is not None:
            hidden = hidden + torch.sigmoid(self.memory(other))
        if mask is not None:
            hidden = hidden.masked_fill(mask == 0, 0.5) if mask.dtype == torch.bool else hidden + mask.tanh()
        if mode == "outputs":
            return hidden, torch.sin(hidden), hidden.argmax(-1), mask, "text", 3, None
        return [hidden.sum(), {"h": hidden, "x": x}] if mode == "list" else hidden


def randoms(rng: torch.Generator, number: int, grad: bool = True) -> list[Tensor]:
    """Inputs that all differ."""
    return [torch.randn(B, D, generator=rng, dtype=torch.float64).requires_grad_(grad) for _ in range(number)]


def measured(subject: Subject, func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """The pair that measure_memory_usage gives, if it is one."""
    result = subject.measure_memory_usage(func, *args, **kwargs)
    what = "measure_memory_usage"
    assert isinstance(result, tuple) and len(result) == 2, (
        f"{what}: a {type(result).__name__} came, (result, peak MiB) was wanted"
    )
    kind = type(result[1]).__name__
    assert kind in ("float", "int"), f"{what}: the peak is a {kind}, not a Python number"
    return result


def same_peak(came: float, wanted: float, what: str, alone: Callable[[], float] | None = None) -> None:
    """Within 10 %, and within a hundredth of a MiB of nothing; `alone` measures the same in a file loaded anew."""
    if abs(came - wanted) <= max(0.1 * wanted, 0.01):
        return
    hint = "storages made inside count, once each and while they live; 1 MiB is 2^20 bytes"
    with suppress(Exception):
        if alone is not None and abs(alone() - wanted) <= max(0.1 * wanted, 0.01):
            hint = "as the first call it is right: each call starts at 0, and only storages made in this call count"
    raise AssertionError(f"{what}: a peak of {came:.4g} MiB came, {wanted:.4g} MiB were wanted, to 10 %\n{hint}")


def first_peak(subject: Subject, func: Callable[..., Any], x: Tensor) -> float:
    """What a call gives that is the first one."""
    return measured(subject.again(), func, x)[1]


_TOP, _POP = torch._C._autograd._top_saved_tensors_default_hooks, torch._C._autograd._pop_saved_tensors_default_hooks


def left_on() -> str:
    """What is switched on that observes tensors or changes how they are computed; it goes off."""
    found = ""
    while _TOP(True) is not None:
        _POP()
        found = "a saved-tensor hook"
    while torch._C._len_torch_dispatch_stack():
        _pop_mode()
        found = "a dispatch mode"
    if torch._C._len_torch_function_stack():
        found = "a function mode"
    if torch.autograd._profiler_enabled():
        torch.autograd._disable_profiler()
        found = "the profiler"
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        found = "no_grad"
    if torch.is_autocast_enabled("cpu"):
        torch.set_autocast_enabled("cpu", False)
        found = "autocast"
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    return found
