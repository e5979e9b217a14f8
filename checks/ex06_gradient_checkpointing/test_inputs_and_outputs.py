"""Inputs and outputs (6.4): nested modules, and arguments and results of any kind and structure."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from harness.testing import Close, Subject, calls, requirement

from .reference import (
    ALIKE,
    INPUTS,
    NOTHING_TWICE,
    B,
    Block,
    D,
    Hint,
    L,
    Map,
    Pair,
    Rich,
    Scale,
    nested_wrapper,
    randoms,
    recomputes,
    run_backward,
    same_gradient,
    seeded,
    text,
    tree,
    ups,
)


@pytest.fixture
def close() -> Close:
    """To five digits: how exact gradients are is asked elsewhere (6.7)."""
    return Close(1e-5)


def agrees_with_plain(
    subject: Subject,
    close: Close,
    args: tuple[Any, ...],
    used: tuple[int, ...] | None = None,
    hint: str = "",
    made: bool = False,
    **kwargs: Any,
) -> None:
    """Outputs and the gradients of inputs and parameters are the plain module's, and something is computed twice.

    If `made`, inputs that need a gradient are made from others, and used outside the module too.
    """
    plain, module = seeded(Rich), seeded(Rich)
    expected, leaves, outside = on_leaves(plain, args, kwargs, made)
    differentiate((expected, outside), used)

    def told() -> str:
        """What is special in this call, if it is that which fails."""
        return hint if hint and usual_step_works(subject) else ""

    def lacks() -> str:
        """What an input without its gradient points to."""
        return told() or (DEEP if any(leaf.grad is not None for leaf in came) else INPUTS)

    with calls(module.block.up) as entered:
        try:
            outputs, came, outside = on_leaves(subject.CheckpointWrapper(module), args, kwargs, made)
            call = ", ".join(["…"] * len(args) + [f"{name}=…" for name in kwargs])
            same_structure(close, outputs, expected, f"forward of a wrapped module({call})", told)
            differentiate((outputs, outside), used)
        except (AssertionError, NotImplementedError):
            raise
        except Exception as error:
            what = f"forward or backward of a wrapped module raises {type(error).__name__}: {error}"
            raise AssertionError(f"{what}\n{told()}".rstrip()) from error

    for number, (leaf, wanted) in enumerate(zip(came, leaves, strict=True)):
        what = f"backward of a wrapped module: gradient of tensor input {number}"
        same_gradient(close, leaf.grad, wanted.grad, what, told, missing=lacks)
    for (name, parameter), wanted in zip(module.named_parameters(), plain.parameters(), strict=True):
        what = f"backward of a wrapped module: gradient of {name}"
        same_gradient(close, parameter.grad, wanted.grad, what, told, missing=lambda: told() or ALIKE)
    assert entered[module.block.up] > 1, f"training step: {NOTHING_TWICE}"


def usual_step_works(subject: Subject) -> bool:
    """Whether a step on one input that needs a gradient gives it and the parameters theirs."""
    with suppress(Exception):
        module, x = seeded(Rich), torch.ones(B, D, dtype=torch.float64).requires_grad_()
        subject.CheckpointWrapper(module)(x).sum().backward()
        return all(one.grad is not None for one in (x, module.block.up.weight))
    return False


MADE = (
    "; its tensors are made from others, and used outside the module too: each of them, however deep, has to be a "
    "detached one in the second computation, or backward goes on behind it"
)
DEEP = "every tensor that needs a gradient gets its own, in args and kwargs, however deep"


def on_leaves(module: Any, args: Any, kwargs: Any, made: bool) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Calls the module on leaves of its own, or on what is made from them; gives its outputs, the leaves, and that."""
    leaves: dict[int, Tensor] = {}
    tree_map_only(Tensor, lambda t: leaves.setdefault(id(t), twin(t)), (args, kwargs))
    given = {key: leaf.sin() if made and leaf.requires_grad else leaf for key, leaf in leaves.items()}
    args, kwargs = tree_map_only(Tensor, lambda t: given[id(t)], (args, kwargs))
    return module(*args, **kwargs), list(leaves.values()), list(given.values()) if made else []


def differentiate(outputs: Any, used: tuple[int, ...] | None) -> None:
    """Runs backward from the outputs that carry gradient, or from those of them that are `used`."""
    floats = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    chosen = floats if used is None else [floats[number] for number in used]
    torch.stack([(leaf * (number + 2)).sin().sum() for number, leaf in enumerate(chosen)]).sum().backward()


def twin(tensor: Tensor) -> Tensor:
    """A leaf of its own over the same values, with the same need of a gradient."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def same_structure(close: Close, came: Any, wanted: Any, what: str, hint: Hint) -> None:
    """Two nested structures have the same containers, tensors and other values."""
    came_leaves, came_tree = tree_flatten(came)
    leaves, structure = tree_flatten(wanted)
    assert came_tree == structure, (
        f"{what}: the structure {tree_map_only(Tensor, lambda _: 'tensor', came)} came, "
        f"{tree_map_only(Tensor, lambda _: 'tensor', wanted)} was wanted"
    )
    for number, (one, other) in enumerate(zip(came_leaves, leaves, strict=True)):
        if not isinstance(other, Tensor):
            assert type(one) is type(other) and one == other, f"{what}: output {number} is {one!r}, not {other!r}"
            continue
        close(one, other, f"{what}: output {number}")
        assert one.requires_grad or not other.requires_grad, (
            f"{what}: output {number}, {other.dtype} {tuple(other.shape)}, carries no gradient; the plain module's does"
            f"\n{text(hint)}".rstrip()
        )


@requirement("6.4")
def test_inputs_without_gradient_still_train_the_parameters(
    subject: Subject, close: Close, rng: torch.Generator
) -> None:
    """Data needs no gradient; the parameters behind it do."""
    hint = "no input needs a gradient here, as with data or token ids; the parameters do"
    agrees_with_plain(subject, close, tuple(randoms(rng, 1, grad=False)), hint=hint)


@requirement("6.4")
def test_each_input_that_needs_a_gradient_gets_it(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Inputs with and without gradient may be mixed."""
    for needs in ((True, False), (False, True)):
        x, other = (tensor.detach().requires_grad_(need) for tensor, need in zip(randoms(rng, 2), needs, strict=True))

        agrees_with_plain(subject, close, (x, other))


@requirement("6.4")
def test_keyword_arguments(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Keyword arguments reach both computations: numbers, and tensors with their gradients, however deep."""
    x, other, a = randoms(rng, 3)

    hint = "scale=3.0 is a keyword argument here; keyword arguments must reach the second computation too"
    agrees_with_plain(subject, close, (x,), hint=hint, scale=3.0)
    hint = "other=… and scale=-2.0 are keyword arguments here"
    agrees_with_plain(subject, close, (x,), hint=hint, other=other, scale=-2.0)
    hint = "mode=… and x=… are keyword arguments here, x is nested, and two outputs carry gradient"
    for made in (False, True):
        hint += MADE if made else ""
        agrees_with_plain(
            subject, close, (), hint=hint, made=made, mode="structures", x=(x, {"a": a, "b": ([other], 3)})
        )


@requirement("6.4")
def test_masks(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Boolean and float masks work as keyword arguments, also one that needs a gradient."""
    x, values = randoms(rng, 2)

    for kind, mask in {"bool": values > 0, "needs a gradient": values}.items():
        agrees_with_plain(subject, close, (x,), hint=f"mask=… is a keyword argument here ({kind})", mask=mask)


@requirement("6.4")
def test_several_outputs_of_any_kind(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Tensors, integers, a mask, text, numbers and None come out as they are, with the gradients of what is used."""
    x, other = randoms(rng, 2)

    for used in ((0,), (1,)):
        agrees_with_plain(subject, close, (x, other, "outputs"), used=used, mask=x.detach() > 0)


@requirement("6.4")
def test_arguments_that_are_no_tensors(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """None and text may stand among the positional arguments; a list, and an input itself, may be among the outputs."""
    agrees_with_plain(subject, close, (randoms(rng, 1)[0], None, "list"))


@requirement("6.4")
def test_nested_structures(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Tensors deep in tuples, lists and dicts get their gradients, also if they are made from others and used outside
    too; outputs deep in them carry gradient.
    """
    for grad, made in ((True, False), (True, True), (False, False)):
        x, a, b, unused = randoms(rng, 4, grad)
        hint = "x is nested here" + MADE if made else ""

        agrees_with_plain(subject, close, ((x, {"a": a, "b": ([b], 3)}), unused, "structures"), hint=hint, made=made)


class Asks(nn.Module):
    """Gives something else where its second input is its first."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Map(D, D)

    def forward(self, x: Tensor, *, other: Tensor) -> Tensor:
        return torch.sin(self.up(x)) if other is x else self.up(x) * other


@requirement("6.4")
def test_a_module_may_ask_whether_two_inputs_are_one(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One tensor as an argument and as a keyword argument is one the second time; two tensors are two."""
    plain, module = seeded(Asks), seeded(Asks)
    wrapper = subject.CheckpointWrapper(module)
    for case in ("one tensor", "a tensor and its detached self", "two leaves over one memory"):
        leaves = [torch.full((2, D), 0.7, dtype=torch.float64).requires_grad_() for _ in range(2)]
        others = [x if case == "one tensor" else x.detach().requires_grad_("leaves" in case) for x in leaves]
        for one, x, other in zip((plain, wrapper), leaves, others, strict=True):
            one.zero_grad()
            run_backward(one(x, other=other).square().sum())

        what = f"backward of a wrapped module whose arguments are {case}"
        hint = "tensors that share memory are two in the second computation too, each with a gradient of its own"
        if case == "one tensor":
            hint = "one tensor given twice is one in the second computation too, and gets its gradient once"
        missing = INPUTS if case == "one tensor" else hint
        same_gradient(close, leaves[1].grad, leaves[0].grad, f"{what}: gradient of x", hint, missing=missing)
        same_gradient(close, others[1].grad, others[0].grad, f"{what}: gradient of other", hint, missing=missing)
        for (name, parameter), wanted in zip(module.named_parameters(), plain.parameters(), strict=True):
            same_gradient(close, parameter.grad, wanted.grad, f"{what}: gradient of {name}", hint, missing=ALIKE)
    recomputes(subject, torch.randn(2, D, generator=rng, dtype=torch.float64))


@requirement("6.4")
def test_inputs_are_not_written_to(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Inputs are not even written to with what they hold, and keep their need of a gradient."""
    x, other = randoms(rng, 2)
    other = other.detach()
    kept = [x.detach().clone(), other.clone()]
    versions = [x._version, other._version]
    module = seeded(Rich)

    with calls(module.block.up) as entered:
        run_backward(subject.CheckpointWrapper(module)(x, other=other).sum())

    close(x.detach(), kept[0], "x after a step", tolerance=0)
    close(other, kept[1], "other after a step", tolerance=0)
    assert [x._version, other._version] == versions, "a step of a wrapped module writes to an input"
    assert not other.requires_grad and other.grad is None, "an input that needed no gradient requires one after a step"
    assert x.is_leaf and x.grad is not None, "backward of a wrapped module: x gets no gradient"
    assert entered[module.block.up] > 1, f"training step: {NOTHING_TWICE}"


@requirement("6.4")
def test_an_encoder_layer_with_masks(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """PyTorch's own encoder layer keeps its masks in the second computation."""

    def build() -> Any:
        return nn.TransformerEncoderLayer(D, 2, 7, dropout=0.0, batch_first=True)

    plain, module = seeded(build), seeded(build)
    x = torch.randn(B, L, D, generator=rng, dtype=torch.float64)
    masks = {
        "src_mask": torch.ones(L, L).triu(1).bool(),
        "src_key_padding_mask": torch.arange(L).expand(B, L) >= 3,
    }
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    expected = plain(leaves[0], **masks)
    expected.square().sum().backward()

    with calls(module.linear1) as entered:
        output = subject.CheckpointWrapper(module)(leaves[1], **masks)
        run_backward(output.square().sum())

    names = " and ".join(masks)
    hint = f"{names} must reach the second computation too"
    close(output, expected, f"forward of a wrapped encoder layer with {names}", hint=hint)
    what = f"backward of a wrapped encoder layer with {names}"
    same_gradient(close, leaves[1].grad, leaves[0].grad, f"{what}: gradient of x", hint)
    for (part, parameter), wanted in zip(module.named_parameters(), plain.parameters(), strict=True):
        same_gradient(close, parameter.grad, wanted.grad, f"{what}: gradient of {part}", hint, missing=ALIKE)
    assert entered[module.linear1] > 1, f"training step: {NOTHING_TWICE}"


@requirement("6.4")
def test_wrapped_inside_wrapped(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A wrapper around wrapped blocks trains as the plain blocks do, on an input without gradient."""
    x = randoms(rng, 1, grad=False)[0]
    plain, layers = (seeded(lambda: nn.Sequential(Block(), Block())) for _ in range(2))
    expected = plain(x)
    expected.square().sum().backward()

    with calls(*ups(layers)) as entered:
        output = nested_wrapper(subject, *layers)(x)
        run_backward(output.square().sum())

    what = "backward of wrapped blocks inside a wrapper"
    close(output, expected, "forward of wrapped blocks inside a wrapper")
    for (name, parameter), wanted in zip(layers.named_parameters(), plain.parameters(), strict=True):
        same_gradient(close, parameter.grad, wanted.grad, f"{what}: gradient of {name}", missing=ALIKE)
    assert len(entered) == 2 and min(entered.values()) > 1, f"training step: {NOTHING_TWICE}"


class Halves(nn.Module):
    """Two outputs, the second computed from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x))
        return hidden.sin(), torch.tanh(self.second(hidden)).cos()


@requirement("6.4")
def test_a_backward_from_each_output(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """backward twice from one output with retain_graph, then from the other, adds up to the plain gradients."""
    x = randoms(rng, 1)[0]
    pair = Pair(subject, lambda: tree(layers=nn.ModuleList([Halves()])))

    def step(model: Any) -> None:
        outputs = model.layers[0](x)
        for number in (0, 0, 1):
            outputs[number].square().sum().backward(retain_graph=True)

    pair.step(step)

    hint = "each backward needs a part of what is computed again; the next one may need another part"
    pair.agree(close, "backward from outputs (0, 0, 1), one after the other", hint)


class Constant(nn.Module):
    """A parameter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.up = Scale()

    def forward(self, power: int) -> Tensor:
        return self.up(self.weight).sin() ** power


@requirement("6.4")
def test_no_tensor_among_the_arguments(subject: Subject, close: Close) -> None:
    """A module that is called without any tensor trains its parameters too."""
    plain, module = seeded(Constant), seeded(Constant)
    expected = plain(3)
    expected.sum().backward()

    with calls(module.up) as entered:
        output = subject.CheckpointWrapper(module)(3)
        run_backward(output.sum())

    close(output, expected, "forward of a wrapped module that takes no tensor")
    what = "backward of a wrapped module that takes no tensor: gradient of its parameter"
    same_gradient(close, module.weight.grad, plain.weight.grad, what, missing=ALIKE)
    assert entered[module.up] > 1, f"training step: {NOTHING_TWICE}"
