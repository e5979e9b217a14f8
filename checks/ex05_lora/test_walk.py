"""A walk over calls of adapted layers (5.1 to 5.5, 5.7), in which everything is drawn together."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.testing import Aspect, Close, Step, Subject, Trace, Walk, is_tensor, walk_check

from .reference import linear, randomize, trainable, value

# What one rounding of each dtype is worth, over sums of a few dozen terms.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
# How far an input stands off to one side, so that sums of it are still exact enough.
OFFSETS = {torch.float64: 1000.0, torch.float32: 100.0, torch.bfloat16: 10.0, torch.float16: 10.0}
MODES: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@dataclass
class Known:
    """A LoRALinear of the learner's, and what its tensors must hold, in its dtype."""

    layer: Any
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float
    merged: bool = False
    training: bool = True
    seen: int = 0
    dropped: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """That of the layer."""
        return self.weight.dtype

    def sum(self) -> Tensor:
        """W + alpha/rank · B A, in float64."""
        return self.weight.double() + self.scaling * self.b.double() @ self.a.double()

    def write(self, rng: torch.Generator, scale: float = 0.5, data: bool = False) -> None:
        """New random numbers in A and B, in place."""
        layer = self.layer
        for tensor in (self.a, self.b):
            randomize(rng, tensor, scale=scale)
        if self.dropout and self.a.size(0) == self.a.size(1):
            # So that what reached A can be told from the output.
            self.a.mul_(0.2).fill_diagonal_(1.0)
            self.b.mul_(0.2).fill_diagonal_(-1.0)
        with torch.no_grad():
            for tensor, wanted in ((layer.lora_A, self.a), (layer.lora_B, self.b)):
                (tensor.data if data else tensor).copy_(wanted)


@dataclass
class Layers:
    """The layers of a walk, made when they are first called."""

    subject: Subject
    known: dict[tuple[Any, ...], Known] = field(default_factory=dict)

    def at(self, key: tuple[int, int, bool, int, float, float], rng: torch.Generator) -> Known:
        """The layer of some sizes."""
        if key not in self.known:
            self.known[key] = self.made(key, torch.float64, rng)
        return self.known[key]

    def made(self, key: tuple[int, int, bool, int, float, float], dtype: torch.dtype, rng: torch.Generator) -> Known:
        """A new layer whose A and B are random too."""
        in_features, out_features, bias, rank, alpha, dropout = key
        original = linear(rng, in_features, out_features, bias)
        # With a base that asks for gradients and with one that does not.
        original.requires_grad_(rank % 2 == 0)
        layer = self.subject.LoRALinear(original, rank=rank, alpha=alpha, dropout=dropout).to(dtype)
        weight, own_bias = (None if held is None else value(held) for held in (original.weight, original.bias))
        assert weight is not None, "the check's own set-up holds"
        empty = weight.new_empty(rank, in_features), weight.new_empty(out_features, rank)
        known = Known(layer, weight, own_bias, *empty, alpha / rank, dropout)
        known.write(rng)
        return known


class Calls(Walk):
    """Calls of a few layers."""

    aspects = (
        Aspect("exact", "5.7", {"": False, "to its dtype's own precision": True}),
        Aspect("scale", "5.1", {"": 0, "x far above 0": 1, "x far below 0": -1, "rows of very different scale": 2}),
        Aspect("watch", "5.4", {"": False, "a layer 31 -> 29": True}, rate=0.2),
        Aspect("read", "5.2", {"": False, "with a look at x": True}),
        Aspect("frozen", "5.5", {"": False, "with a look at W afterwards": True}),
        Aspect(
            "merge",
            "5.5",
            {
                "": (),
                "while merged": ("merge", "call", "unmerge"),
                "while merged twice": ("merge", "merge", "call", "unmerge"),
                "after merging and unmerging": ("merge", "unmerge", "call"),
                "while merged again after a new W": ("merge", "unmerge", "base", "merge", "call", "unmerge"),
                "after unmerge_weights alone": ("unmerge", "call"),
            },
            rate=0.3,
        ),
        Aspect("dropout", "5.7", {"": 0.0, "dropout 0.4": 0.4, "dropout 1": 1.0}, rate=0.25),
        Aspect(
            "dtype",
            "5.7",
            {
                "": torch.float64,
                "in float32": torch.float32,
                "in bfloat16": torch.bfloat16,
                "in float16": torch.float16,
            },
            rate=0.3,
        ),
        Aspect("autocast", "5.7", {"": False, "under autocast": True}, rate=0.2),
        Aspect(
            "before",
            "5.1",
            {
                "": "",
                "after new A and B": "new",
                "after new A and B by .data": "data",
                "after load_state_dict": "load",
                "after a new W": "base",
                "with B zero": "zero",
                "with a tiny B": "tiny",
                "after an input of another width": "error",
            },
        ),
        Aspect(
            "rank",
            "5.1",
            {"": (1, 2.5), "rank 3": (3, 5.0), "rank 16": (16, 6), "rank 9, alpha -2.5": (9, -2.5), "alpha 0": (2, 0)},
        ),
        Aspect(
            "layer",
            "5.2",
            {
                "": (5, 4, False),
                "with bias": (5, 4, True),
                "in = out": (4, 4, False),
                "one feature in, with bias": (1, 4, True),
                "one feature out": (5, 1, False),
            },
        ),
        Aspect(
            "shape",
            "5.2",
            {
                "": (5,),
                "one row": (1,),
                "a vector": (),
                "no rows": (0,),
                "1100 rows": (1100,),
                "4 dimensions": (2, 1, 3),
            },
        ),
        Aspect(
            "layout",
            "5.2",
            {"": "", **{f"x {name}": name for name in ("transposed", "sliced", "expanded", "overlapping")}},
        ),
        Aspect("flag", "5.1", {"": None, "after eval()": False, "after train()": True}),
        Aspect("mode", "5.1", {"": "", "under no_grad": "no_grad", "under inference_mode": "inference"}),
        Aspect("asks", "5.1", {"": True, "x without gradient": False}, rate=0.3),
    )
    otherwise = "5.1"

    def begin(self, subject: Subject) -> Layers:
        """No layer yet."""
        return Layers(subject)

    def step(self, state: Layers, step: Step) -> None:
        """One call of one layer, with a step of gradient descent if gradients are on."""
        rng = step.rng()
        known = chosen(state, step, rng)
        before(state, known, step, rng)
        for act in step["merge"] or ("call",):
            if act == "call":
                self.call(known, step, rng)
            elif act == "base":
                change(state, known, act, rng)
            else:
                getattr(known.layer, f"{act}_weights")()
                known.merged = act == "merge"
                kept(known)
        if step["frozen"]:
            frozen(known)

    def call(self, known: Known, step: Step, rng: torch.Generator) -> None:
        """The call itself."""
        x = made_input(known, step, rng)
        layer, start, version = known.layer, value(x), x._version
        grad = step["mode"] == ""
        if step["flag"] is not None:
            layer.train(step["flag"])
            known.training = step["flag"]
        with contextlib.ExitStack() as stack:
            stack.enter_context(MODES[step["mode"]]())
            if step["autocast"]:
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            seen = stack.enter_context(Trace()) if step["watch"] else None
            output = is_tensor(layer(x), "forward(x)")
        call = Call(known, step, start)
        # A cast of W is autocast's own.
        if seen is not None and not step["autocast"]:
            call.costs(seen)
        if step["read"]:
            assert torch.equal(x, start), "forward(x): x has changed"
            assert x._version == version, "forward(x): x is written to, if only to be put back"
        call.gives(output)
        if grad:
            call.moves(x, output, rng)


def chosen(state: Layers, step: Step, rng: torch.Generator) -> Known:
    """The layer that a step calls."""
    (in_features, out_features, bias), (rank, alpha), dropout = step["layer"], step["rank"], step["dropout"]
    if step["watch"]:
        in_features, out_features = 31, 29
    elif dropout:
        in_features = out_features = rank = 4
    return state.at((in_features, out_features, bias, rank, alpha, dropout), rng)


def before(state: Layers, known: Known, step: Step, rng: torch.Generator) -> None:
    """What happens to a layer before it is called."""
    layer, act = known.layer, step["before"]
    if act or step["dtype"] != known.dtype:
        # So that there is something to remember.
        with MODES[step["mode"]]():
            layer(torch.ones(2, known.weight.size(1), dtype=known.dtype))
    if step["dtype"] != known.dtype:
        layer.to(step["dtype"])
        known.weight, known.a, known.b = (held.to(step["dtype"]) for held in (known.weight, known.a, known.b))
        known.bias = None if known.bias is None else known.bias.to(step["dtype"])
    if act == "error":
        with contextlib.suppress(Exception):
            layer(torch.ones(2, known.weight.size(1) + 1, dtype=known.dtype))
    elif act or known.dropout:
        change(state, known, act, rng)


def change(state: Layers, known: Known, act: str, rng: torch.Generator) -> None:
    """New numbers in a layer."""
    layer = known.layer
    if act == "load":
        out_features, in_features = known.weight.shape
        rank = known.a.size(0)
        sizes = (in_features, out_features, known.bias is not None, rank, known.scaling * rank, known.dropout)
        other = state.made(sizes, known.dtype, rng)
        layer.load_state_dict(other.layer.state_dict())
        known.weight, known.bias, known.a, known.b = other.weight, other.bias, other.a, other.b
    elif act == "base":
        with torch.no_grad():
            for tensor, held in ((layer.original_layer.weight, known.weight), (layer.original_layer.bias, known.bias)):
                if held is not None:
                    tensor.mul_(-0.7)
                    held.mul_(-0.7)
    if act != "load":
        known.write(rng, 0.5, act == "data")
    # Where something is dropped out, A and B must tell what.
    if act in ("zero", "tiny") and not known.dropout:
        with torch.no_grad():
            for tensor in (layer.lora_B, known.b):
                tensor.mul_(1e-4 if act == "tiny" else 0)


def made_input(known: Known, step: Step, rng: torch.Generator) -> Tensor:
    """The step's input, [..., in]."""
    lead = (5,) if step["watch"] and step["shape"] == (1100,) else step["shape"]
    shape = (*lead, known.weight.size(1))
    # No element is near 0, so that one that is dropped out can be told.
    x = torch.rand(shape, generator=rng, dtype=torch.float64) + 0.5
    x = torch.where(torch.rand(shape, generator=rng) < 0.5, x, -x)
    if step["scale"] in (1, -1):
        x = x + step["scale"] * OFFSETS[known.dtype]
    elif step["scale"] and lead:
        x = x * torch.logspace(-2, 2, lead[0], dtype=torch.float64).view(-1, *[1] * len(lead))
    x = laid_out(x.to(known.dtype), step["layout"])
    return x.requires_grad_(step["asks"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same shape by other strides; expanded and overlapping ones hold other numbers too."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack((x, x), -1)[..., 0]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "overlapping" and x.numel():
        lead = x.shape[:-1]
        strides = [1]
        for size in lead[:0:-1]:
            strides.insert(0, strides[0] * size)
        return x.flatten().as_strided(x.shape, (*strides[: len(lead)], 1) if lead else (1,)).detach()
    return x


@dataclass
class Call:
    """A call that was made, beside what it must give."""

    known: Known
    step: Step
    x: Tensor

    def __post_init__(self) -> None:
        known, step = self.known, self.step
        low = step["autocast"] and known.dtype != torch.float64
        own = TOLERANCES[torch.bfloat16 if low else known.dtype]
        largest = float(self.x.abs().max()) if self.x.numel() else 1.0
        self.size = max(1.0, largest)
        self.close = Close(own if step["exact"] else max(own, 1e-5))
        self.dtype = torch.bfloat16 if low else known.dtype

    def close_to(self, came: Tensor, wanted: Tensor, what: str) -> None:
        """Values only, by the largest input's scale."""
        limit, scale = self.close.tolerance, self.step["scale"]
        if self.known.dtype != torch.float64 or not self.step["exact"]:
            limit *= 10.0 if scale == 2 else self.size
        self.close(came.detach().double(), wanted, what, tolerance=limit)

    def costs(self, seen: Trace) -> None:
        """No tensor of W's size is made."""
        known, mode = self.known, "training" if self.known.training else "eval"
        assert seen.largest < known.weight.numel(), (
            f"forward(x) in {mode}, rank {known.a.size(0)}: a tensor of {seen.largest} elements is made; "
            f"W has out·in = {known.weight.numel()}\n"
            "multiply x by Aᵀ, and the result by Bᵀ: B A is as large as W"
        )

    def gives(self, output: Tensor) -> None:
        """The formula's output, for the elements that were dropped out if any were."""
        known, x = self.known, self.x.double()
        wanted_shape = (*x.shape[:-1], known.weight.size(0))
        assert output.shape == wanted_shape, f"forward(x): shape {tuple(output.shape)} came, {wanted_shape} was wanted"
        if not self.step["autocast"]:
            assert output.dtype == self.dtype, f"forward(x): {output.dtype} came, {self.dtype} was wanted"
        bias = 0.0 if known.bias is None else known.bias.double()
        base = x @ known.weight.double().T + bias
        self.factor: Any = 1.0
        if known.dropout and known.training and not known.merged:
            if known.a.size(0) != known.a.size(1):
                self.factor = None
                return
            self.factor = self.reached(output.detach().double() - base)
        a, b = known.a.double(), known.b.double()
        wanted = base + known.scaling * (x * self.factor) @ a.T @ b.T
        self.close_to(output, wanted, "forward(x), merged" if known.merged else "forward(x)")

    def reached(self, added: Tensor) -> Tensor:
        """By what each element of x was multiplied on its way into A, as far as the output tells; counts them."""
        known, p = self.known, self.known.dropout
        if not known.scaling:
            return torch.zeros_like(self.x, dtype=torch.float64)
        undone = torch.linalg.inv((known.b.double() @ known.a.double()).T) / known.scaling
        kept = (added @ undone).abs() > 0.5 * self.x.double().abs()
        known.seen += kept.numel()
        known.dropped += kept.numel() - int(kept.sum())
        off, spread = abs(known.dropped - known.seen * p), (known.seen * p * (1 - p)) ** 0.5
        assert off <= 6 * spread + (p < 1), (
            f"forward(x) in training, dropout {p}: {known.dropped} of {known.seen} elements are dropped so far"
        )
        return kept.double() / (1 - p) if p < 1 else torch.zeros_like(added @ undone)

    def moves(self, x: Tensor, output: Tensor, rng: torch.Generator) -> None:
        """One step of gradient descent moves A and B by the formula's gradients, and x gets its own."""
        known, layer = self.known, self.known.layer
        if known.merged and not x.requires_grad:
            return
        assert output.requires_grad, "forward(x): the output carries no gradient"
        probe = torch.randn(output.shape, generator=rng, dtype=torch.float64)
        probe = (probe * (0.1 / self.size / max(1, output.numel()) ** 0.5)).to(output.dtype)
        parameters = trainable(layer)
        starts = [value(parameter) for parameter in parameters] if len(parameters) > 2 else []
        for parameter in parameters:
            parameter.grad = None
        output.backward(probe)
        g, flat = (tensor.double().reshape(-1, tensor.size(-1)) for tensor in (probe, self.x))
        if self.factor is None:
            return
        kept = self.factor.reshape(flat.shape) if isinstance(self.factor, Tensor) else 1.0
        a, b = known.a.double(), known.b.double()
        if x.requires_grad:
            by_w = g @ (known.sum() if known.merged else known.weight.double())
            by_a = 0.0 if known.merged else known.scaling * (g @ b @ a) * kept
            self.gradient(x, (by_w + by_a).view(x.shape))
        if known.merged:
            return
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad)
        moved = {
            "lora_A": a - known.scaling * (g @ b).T @ (flat * kept),
            "lora_B": b - known.scaling * g.T @ (flat * kept @ a.T),
        }
        for name, wanted in moved.items():
            self.close_to(getattr(layer, name), wanted, f"{name} after a step of gradient descent")
        known.a, known.b = value(layer.lora_A), value(layer.lora_B)
        if len(parameters) > 2:
            # The base that asks for gradients, and what is not A or B, goes back.
            with torch.no_grad():
                for parameter, held in zip(parameters, starts, strict=True):
                    parameter.copy_(held)
                layer.lora_A.copy_(known.a)
                layer.lora_B.copy_(known.b)

    def gradient(self, x: Tensor, wanted: Tensor) -> None:
        """That of x, and its form."""
        assert x.grad is not None, "backward: x gets no gradient"
        form = x.grad.shape, x.grad.dtype
        assert form == (x.shape, x.dtype), f"backward: gradient of x: {form} came, {(x.shape, x.dtype)} was wanted"
        self.close_to(x.grad, wanted, "backward: gradient of x")


def kept(known: Known) -> None:
    """After merging or unmerging: W or the sum, A, B, and who is trained."""
    layer, act = known.layer, "merge_weights" if known.merged else "unmerge_weights"
    now = layer.original_layer.weight
    if known.merged:
        limit = max(TOLERANCES[known.dtype], 1e-5)
        Close(limit)(now.detach().double(), known.sum(), f"original_layer.weight after {act}")
        assert now.dtype == known.dtype, f"original_layer.weight after {act}: {now.dtype} came"
    else:
        assert torch.equal(now, known.weight), f"original_layer.weight after {act}: it is not W, bit for bit"
    for name, held in (("lora_A", known.a), ("lora_B", known.b)):
        tensor = getattr(layer, name)
        assert torch.equal(tensor, held), f"{name} has changed after {act}"
        assert tensor.requires_grad, f"{name} no longer asks for gradients after {act}"


def frozen(known: Known) -> None:
    """W and the bias are what they were, whatever was called."""
    layer = known.layer.original_layer
    assert torch.equal(layer.weight, known.weight), "original_layer.weight: it is not W, although nothing is merged"
    if known.bias is not None:
        assert torch.equal(layer.bias, known.bias), "original_layer.bias has changed"


test_calls_in_any_order = walk_check(Calls(), 55)
