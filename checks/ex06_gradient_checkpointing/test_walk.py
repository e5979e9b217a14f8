"""A walk over steps of wrapped modules: all that may lie before, between and in them."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from harness.testing import Aspect, Close, Step, Subject, Walk, seed, walk_check

from .reference import ALIKE, INPUTS, D, Map, autocast, left_on, same_gradient, seeded, wrap_layers


class Layer(nn.Module):
    """Takes and gives whatever there is, asks whether its two inputs are one, and notes each entry's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Map(D, D), Map(D, D)
        self.drop = nn.Dropout(0.0)
        self.entered = 0
        self.seen: list[torch.dtype] = []

    def forward(self, x: Any = None, other: Any = None, *rest: Any, mask: Any = None, give: str = "") -> Any:
        self.entered += 1
        if isinstance(x, dict):
            x, other, rest = x["x"], x["more"][0][0], ("text",) if isinstance(x["more"], tuple) else rest
        x = self.down.weight * 2 if x is None else x if x.is_floating_point() else x.to(self.up.weight.dtype)
        product = self.up(x)
        self.seen.append(product.dtype)
        hidden = torch.tanh(product)
        if other is not None:
            hidden = hidden.cos() if other is x else hidden * torch.sigmoid(self.down(other)).mean(0)
        if mask is not None:
            hidden = hidden * (mask / 1e5).cos() if mask.is_floating_point() else hidden.masked_fill(mask == 0, 0.5)
        y = self.down(self.drop(hidden)) * (3 if "text" in rest else 2)
        return GIVEN[give](y, x)


GIVEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "": lambda y, x: y,
    "which gives several outputs": lambda y, x: (y, y.sin(), y.argmax(-1), y > 0),
    "which gives lists and dicts": lambda y, x: {"a": [y, (y.sin(), None)], "n": 3},
    "which gives its input, too": lambda y, x: [y, x],
    "which gives one tensor twice": lambda y, x: (y, y),
}


class Deeper(nn.Module):
    """A module around one that is called `times`."""

    def __init__(self, inner: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        for _ in range(self.times - 1):
            x = tree_leaves(self.inner(x, *args, **kwargs))[0]
        return self.inner(x, *args, **kwargs)


class Model(nn.Module):
    """Two layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        for layer in self.layers[:-1]:
            x = tree_leaves(layer(x, *args, **kwargs))[0]
        return self.layers[-1](x, *args, **kwargs)


class Twins:
    """A plain module and its wrapped twin.

    Attributes:
        times: how often as often as the plain one each layer is entered in a step; 0 if as often as it likes.
    """

    def __init__(self, subject: Subject, form: str) -> None:
        kind = Model if "model" in form else Layer
        self.plain, self.wrapped = seeded(kind, torch.float32), seeded(kind, torch.float32)
        self.layers = [
            [part for part in one.modules() if isinstance(part, Layer)] for one in (self.plain, self.wrapped)
        ]
        self.times = [2] * len(self.layers[1])
        wrap = subject.CheckpointWrapper
        self.call: Any = None
        if "model" in form:
            every = 2 if "2nd" in form else 1
            wrap_layers(subject, self.wrapped, every)
            self.times = [1 if number % every else 2 for number in range(2)]
        elif "twice" in form:
            self.plain, self.wrapped = Deeper(self.plain, 2), Deeper(wrap(self.wrapped), 2)
        elif "nested" in form:
            self.plain, self.wrapped = Deeper(self.plain), wrap(Deeper(wrap(self.wrapped)))
            self.times = [0]
        elif "use_checkpoint" in form:
            self.wrapped, self.times = wrap(self.wrapped, use_checkpoint=False), [1]
        else:
            if "checkpoint(" in form:
                module = self.wrapped
                self.call = lambda *args, **kwargs: subject.checkpoint(module, *args, **kwargs)
            self.wrapped = wrap(self.wrapped)
        self.both = (self.plain, self.wrapped)


@dataclass
class Modules:
    """The twins by their form, each made at its first use, and now and then anew."""

    subject: Subject
    made: dict[str, Twins] = field(default_factory=dict)

    def twins(self, step: Step) -> Twins:
        """Those of a step."""
        form = step["selected"] or step["kind"] or step["nested"] or step["twice"]
        if step.seed % 4 == 0 or form not in self.made:
            self.made[form] = Twins(self.subject, form)
        return self.made[form]


def words(*choices: str) -> dict[str, Any]:
    """Choices that are their own words, after the plain one."""
    return {choice: choice for choice in ("", *choices)}


PRECISIONS = {"": "off", "under autocast float16": "float16", "under autocast bfloat16": "bfloat16"}


class Steps(Walk):
    """Steps of plain modules and of their wrapped twins."""

    aspects = (
        Aspect(
            "loaded",
            "6.1",
            words(
                "after load_state_dict",
                "after load_state_dict(assign=True)",
                "after the plain module has loaded its state_dict",
            ),
            0.15,
        ),
        Aspect("earlier", "6.7", words(
            "after a call with a wrong shape",
            "after a call under no_grad",
            "after a call under inference_mode",
            "after a call without a backward",
            "after a step",
            "after a call while it was frozen",
        ), 0.3),
        Aspect("mode", "6.2", words(
            "in eval", "under no_grad", "under inference_mode", "in eval under no_grad", "in eval but for its dropout",
        ), 0.25),
        Aspect("kind", "6.2", words("checkpoint(module, …)", "use_checkpoint=False"), 0.25),
        Aspect("evaluated", "6.2", words("after a call in eval"), 0.15),
        Aspect("parts", "6.2", words("its dropout in eval"), 0.2),
        Aspect("autocast", "6.3", PRECISIONS, 0.2),
        Aspect("backward", "6.3", {
            "": "off", "backward under autocast float16": "float16", "backward under autocast bfloat16": "bfloat16",
            "backward in the autocast region of forward": "same",
        }, 0.2),
        Aspect("arguments", "6.4", words(
            "two tensors",
            "one tensor twice",
            "a tensor as a keyword argument",
            "one tensor as argument and keyword argument",
            "tensors in dicts, lists and tuples",
            "one tensor in dicts, lists and tuples twice",
            "a tensor and its detached self",
            "a tensor and a view of it",
            "two leaves over one memory",
            "a float mask without positive numbers",
            "a boolean mask",
            "a uint8 mask",
            "None and a text",
            "no tensor",
            "integers",
            "a parameter of the module",
        )),
        Aspect("give", "6.4", words(*list(GIVEN)[1:]), 0.3),
        Aspect("source", "6.4", words("inputs without gradient", "inputs made from others"), 0.3),
        Aspect("layout", "6.4", words("transposed inputs", "expanded inputs", "overlapping inputs"), 0.3),
        Aspect("nested", "6.4", words("nested wrappers"), 0.15),
        Aspect("twice", "6.7", words("a layer called twice in a row"), 0.15),
        Aspect("calls", "6.7", words(
            "two calls, then two backwards",
            "two calls, then two backwards, the last first",
            "a second backward with retain_graph",
            "a backward from each output",
        ), 0.3),
        Aspect("drop", "6.7", {"": 0.0, "with dropout": 0.5, "with dropout 1": 1.0}),
        Aspect("frozen", "6.7", words("a frozen weight", "all weights frozen"), 0.25),
        Aspect("weights", "6.7", words(
            "after new weights in place",
            "after new weights in .data",
            "after new parameters",
            "after a cast there and back",
        ), 0.3),
        Aspect("between", "6.7", words(
            "draws before backward", "another seed before backward", "a call under no_grad before backward"
        ), 0.3),
        Aspect("selected", "6.1", words("every layer of a model", "every 2nd layer of a model"), 0.25),
        Aspect("dtype", "6.7", words("in float64"), 0.1),
        Aspect("rows", "6.2", {"": 3, "one row": 1, "two rows": 2, "9 rows": 9, "300 rows": 300}, 0.3),
    )  # fmt: skip
    otherwise = ""

    def begin(self, subject: Subject) -> Modules:
        return Modules(subject.again())

    def step(self, state: Modules, step: Step) -> None:
        twins, rng = state.twins(step), step.rng()
        dtype = torch.float64 if step["dtype"] else torch.float32
        for one in twins.both:
            one.train("eval" not in step["mode"])
        load(twins, step["loaded"])
        for one, layers in zip(twins.both, twins.layers, strict=True):
            new_weights(one, layers, step["weights"])
        earlier(twins, step, rng)
        for one, layers in zip(twins.both, twins.layers, strict=True):
            if step["dtype"]:
                one.double()
            prepare(layers, step)

        given = inputs(step, rng, dtype)
        played = []
        for number, one in enumerate(twins.both):
            call = twins.call if number and twins.call and not step["mode"] else one
            played.append(Played(step, one, call, twins.layers[number], given))
        for one in twins.both if step["dtype"] else ():
            one.float()
        self.compare(twins, step, *played)

    def compare(self, twins: Twins, step: Step, plain: "Played", wrapped: "Played") -> None:
        """All that can be seen of a step."""
        what = "a wrapped module"
        same_outputs(wrapped.outputs, plain.outputs, f"forward of {what}")
        assert wrapped.needs == plain.needs, (
            f"forward of {what}: an output asks for a gradient that neither an input nor a parameter needs"
        )
        if plain.needs:
            limit = 1e-4 if step["autocast"] == step["backward"] == "off" else 3e-2
            same_gradients(wrapped, plain, limit, f"backward of {what}")
        assert not wrapped.written, f"a step of {what}: an input is written to"
        assert torch.equal(wrapped.stream, plain.stream), f"a step of {what}: the random stream is not a plain step's"
        assert not (left := left_on()), f"a step of {what}: {left} is still on afterwards"
        for number, (layer, wanted) in enumerate(zip(twins.layers[1], twins.layers[0], strict=True)):
            times = twins.times[number] if plain.needs and not step["mode"] else 1
            same_entries(step, wanted, layer, times, f"a step of {what}: layer {number}")


def same_outputs(came: Any, wanted: Any, what: str) -> None:
    """Two nested structures have the same containers, tensors and other values."""
    came_leaves, came_tree = tree_flatten(came)
    leaves, structure = tree_flatten(wanted)
    assert came_tree == structure, (
        f"{what}: the structure {tree_map_only(Tensor, lambda _: 'tensor', came)} came, "
        f"{tree_map_only(Tensor, lambda _: 'tensor', wanted)} was wanted"
    )
    for one, other in zip(came_leaves, leaves, strict=True):
        if not isinstance(other, Tensor):
            assert one == other, f"{what}: an output is {one!r}, not {other!r}"
            continue
        if type(one) is not Tensor or one.dtype != other.dtype or not torch.equal(one, other):
            Close(1e-5)(one, other, f"{what}: an output")
        assert one.requires_grad or not other.requires_grad, f"{what}: an output carries no gradient, one was wanted"


def same_gradients(wrapped: "Played", plain: "Played", limit: float, what: str) -> None:
    """All gradients at once, and one by one only if these differ."""
    pairs = list(zip(wrapped.gradients(), plain.gradients(), strict=True))
    both = [(came, wanted) for came, wanted in pairs if came is not None and wanted is not None]
    if all((one is None) == (other is None) for one, other in pairs) and all(
        one.dtype == other.dtype and one.shape == other.shape for one, other in both
    ):
        came, wanted = (torch.cat([pair[side].flatten() for pair in both]) for side in (0, 1))
        if torch.allclose(came, wanted, limit, limit):
            return
    for name, (one, other) in zip(wrapped.names(), pairs, strict=True):
        # What cancels in a sum over many rows leaves the rounding of its terms.
        scaled = limit * (1.0 if other is None else 1 + float(other.abs().max()))
        which, missing = f"{what}: gradient of {name}", INPUTS if "input" in name else ALIKE
        same_gradient(Close(limit), one, other, which, tolerance=scaled, missing=missing)


def same_entries(step: Step, plain: Layer, wrapped: Layer, times: int, what: str) -> None:
    """How often a layer is entered, and in which dtype it multiplies."""
    assert set(wrapped.seen) == set(plain.seen), (
        f"{what} multiplies in {set(wrapped.seen)}, the plain one in {set(plain.seen)}"
    )
    least = plain.entered * max(1, times if step["frozen"] != "all weights frozen" else 1)
    most = float("inf") if times == 0 or (times == 2 and step["calls"] in AGAIN) else plain.entered * times
    least = plain.entered + 1 if times == 0 and least == plain.entered and not step["frozen"] else least
    assert least <= wrapped.entered <= most, (
        f"{what} is entered {wrapped.entered} times, {least} were wanted; the plain one is {plain.entered} times"
    )


AGAIN = ("a second backward with retain_graph", "a backward from each output")


def prepare(layers: list[Layer], step: Step) -> None:
    """Sets what a step says of the modules themselves."""
    for layer in layers:
        layer.drop.p = step["drop"]
        if step["parts"] or "but" in step["mode"]:
            layer.drop.train("but" in step["mode"])
        for parameter in layer.parameters():
            parameter.requires_grad_(step["frozen"] != "all weights frozen")
            parameter.grad = None
        if step["frozen"] == "a frozen weight":
            layer.up.weight.requires_grad_(False)
        layer.entered = 0
        layer.seen.clear()


def new_weights(one: nn.Module, layers: list[Layer], how: str) -> None:
    """Changes a module's weights."""
    with torch.no_grad():
        if "place" in how:
            for layer in layers:
                layer.up.weight.sub_(0.1 * layer.up.weight.sin())
                layer.down.weight.mul_(-1)
        elif "data" in how:
            for layer in layers:
                layer.up.weight.data = layer.up.weight.cos() / 2
        elif "cast" in how:
            one.half().float()
        elif "parameters" in how:
            for layer in layers:
                layer.up.weight = nn.Parameter(layer.up.weight.cos() / 2)


def load(twins: Twins, how: str) -> None:
    """Loads the one's state_dict into the other, after its values have changed."""
    if not how:
        return
    target, source = (twins.plain, twins.wrapped) if "plain" in how else (twins.wrapped, twins.plain)
    layers = twins.layers["plain" not in how], twins.layers["plain" in how]
    with torch.no_grad():
        for layer in layers[1]:
            layer.down.bias.add_(0.5).remainder_(1)
    state = source.state_dict()
    if "assign" in how:
        state = {key: value.clone() for key, value in state.items()}
    target.load_state_dict(state, assign="assign" in how)
    for one, other in zip(*layers, strict=True):
        assert torch.equal(one.down.bias, other.down.bias), "load_state_dict: the values do not arrive"


def earlier(twins: Twins, step: Step, rng: torch.Generator) -> None:
    """What the wrapped module is called with before the step."""
    how, wrapped, mode = f"{step['earlier']} {step['evaluated']}", twins.wrapped, twins.wrapped.training
    if how == " ":
        return
    if "wrong" in how:
        with suppress(RuntimeError):
            wrapped(torch.ones(2, D + 1))
        assert not (left := left_on()), f"a call of a wrapped module with a wrong shape: {left} is still on afterwards"
        return
    x = torch.randn(2, D, generator=rng).requires_grad_("frozen" not in how)
    for layer in twins.layers[1]:
        layer.requires_grad_("frozen" not in how)  # `prepare` puts it right
    with ExitStack() as stack:
        if "no_grad" in how:
            stack.enter_context(torch.no_grad())
        if "inference" in how:
            stack.enter_context(torch.inference_mode())
        output = wrapped.train("eval" not in how)(x)
        if "step" in how and output.requires_grad:
            output.sum().backward()
    wrapped.train(mode)


def inputs(step: Step, rng: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two tensors in a layout, and a mask."""
    rows = step["rows"]
    numbers = torch.randn(2, rows + 1, D, generator=rng, dtype=dtype)
    x, other = numbers[:, :rows]
    if "transposed" in step["layout"]:
        x, other = (tensor.T.contiguous().T for tensor in (x, other))
    elif "expanded" in step["layout"]:
        x, other = (tensor[:1].expand(rows, D) for tensor in (x, other))
    elif "overlapping" in step["layout"]:
        x, other = (tensor.as_strided((rows, D), (1, 1)) for tensor in (x, other))
    return x, other, torch.rand(rows, D, generator=rng) > 0.4


Given = tuple[tuple[Any, ...], dict[str, Any]]
ARGUMENTS: dict[str, Callable[[Tensor, Tensor, Tensor, Layer], Given]] = {
    "": lambda x, y, mask, layer: ((x,), {}),
    "two tensors": lambda x, y, mask, layer: ((x, y), {}),
    "one tensor twice": lambda x, y, mask, layer: ((x, x), {}),
    "a tensor as a keyword argument": lambda x, y, mask, layer: ((x,), {"other": y}),
    "one tensor as argument and keyword argument": lambda x, y, mask, layer: ((x,), {"other": x}),
    "tensors in dicts, lists and tuples": lambda x, y, mask, layer: (({"x": x, "more": [(y,)]},), {}),
    "one tensor in dicts, lists and tuples twice": lambda x, y, mask, layer: (({"x": x, "more": ([x], 3)},), {}),
    "a tensor and its detached self": lambda x, y, mask, layer: ((x, x.detach()), {}),
    "a tensor and a view of it": lambda x, y, mask, layer: ((x, x[:]), {}),
    "two leaves over one memory": lambda x, y, mask, layer: ((x, y), {}),
    "a float mask without positive numbers": lambda x, y, mask, layer: ((x,), {"mask": x.detach().abs() * -1e5}),
    "a boolean mask": lambda x, y, mask, layer: ((x,), {"mask": mask}),
    "a uint8 mask": lambda x, y, mask, layer: ((x,), {"mask": mask.byte()}),
    "None and a text": lambda x, y, mask, layer: ((x, None, "text", 7), {}),
    "no tensor": lambda x, y, mask, layer: ((), {}),
    "integers": lambda x, y, mask, layer: (((x.detach() * 5).long(),), {}),
    "a parameter of the module": lambda x, y, mask, layer: ((x, layer.down.weight), {}),
}


class Played:
    """One step of a module, and what was seen of it."""

    def __init__(
        self, step: Step, module: nn.Module, call: Any, layers: list[Layer], given: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        needs, one = not step["source"].endswith("without gradient"), "two leaves" in step["arguments"]
        self.leaves = [given[0 if one else number].detach().requires_grad_(needs) for number in (0, 1)]
        self.layers = layers
        self.versions: list[tuple[Tensor, int]] = []
        self.outputs: list[Any] = []
        self.needs = False
        seed(step.seed % 977)
        with ExitStack() as stack:
            if "no_grad" in step["mode"]:
                stack.enter_context(torch.no_grad())
            if "inference" in step["mode"]:
                stack.enter_context(torch.inference_mode())
            region = stack.enter_context(ExitStack())
            region.enter_context(autocast(step["autocast"]))
            for _ in range(2 if "two" in step["calls"] else 1):
                args, kwargs = self.arguments(step, given[2])
                output = call(*args, **kwargs)
                self.outputs.append((output, self.made) if self.made else output)  # used outside, too
            self.between(step, module)
            if step["backward"] != "same":
                region.close()
                region.enter_context(autocast(step["backward"]))
            if torch.is_grad_enabled():
                self.backward(step)
        self.stream = torch.get_rng_state()
        self.written = any(version != tensor._version for tensor, version in self.versions)

    def arguments(self, step: Step, mask: Tensor) -> Given:
        """What a call gets."""
        self.made = [leaf.sin() * 1.5 for leaf in self.leaves] if "made" in step["source"] else []
        x, other = self.made or self.leaves
        args, kwargs = ARGUMENTS[step["arguments"]](x, other, mask, self.layers[0])
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and not tensor.is_inference():
                self.versions.append((tensor, tensor._version))
        return args, kwargs | ({"give": step["give"]} if step["give"] else {})

    def between(self, step: Step, module: nn.Module) -> None:
        """What happens before backward."""
        if "draws" in step["between"]:
            torch.rand(3)
        elif "seed" in step["between"]:
            seed(3)
        elif "call" in step["between"]:
            entered = [(layer.entered, list(layer.seen)) for layer in self.layers]
            with torch.no_grad():
                module(torch.ones(1, D, dtype=self.leaves[0].dtype))
            for layer, (count, seen) in zip(self.layers, entered, strict=True):
                layer.entered, layer.seen = count, seen

    def backward(self, step: Step) -> None:
        """Runs the backwards that a step asks for."""
        losses: list[Tensor] = []
        for output in self.outputs:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            parts = [(leaf.float() * (number + 2)).sin().sum() for number, leaf in enumerate(tensors)]
            losses += parts if "each" in step["calls"] else [sum(parts)] if parts else []  # type: ignore[list-item]
        self.needs = bool(losses)
        if "last first" in step["calls"]:
            losses.reverse()
        again = "second" in step["calls"]
        for loss in losses:
            loss.backward(retain_graph=again or "each" in step["calls"])
            if again:
                loss.backward()

    def gradients(self) -> list[Tensor | None]:
        """Of the inputs, then of the parameters."""
        return [tensor.grad for tensor in (*self.leaves, *(p for layer in self.layers for p in layer.parameters()))]

    def names(self) -> list[str]:
        """Of what the gradients are of."""
        parameters = [f"layer {n}, {name}" for n, one in enumerate(self.layers) for name, _ in one.named_parameters()]
        return ["the input", "the other input", *parameters]


test_calls_in_any_order = walk_check(Steps(), 30)
