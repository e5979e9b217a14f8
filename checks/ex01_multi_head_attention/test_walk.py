"""A walk over what no single check crosses: masks, roles, layouts, precisions, modes, what lies between calls."""

import gc
import math
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.testing import Aspect, Close, Step, Subject, Trace, Walk, is_tensor, seed, walk_check

from .reference import FOLLOWS, PRECISE, VALUES, B, D, H, dropped, formula, joined, refuses_mask, unpack

LAYERS = ("q_linear", "k_linear", "v_linear", "output_linear")
NAMES = [f"{layer}.{kind}" for kind in ("weight", "bias") for layer in LAYERS]


class Kind(NamedTuple):
    """A precision: the dtype of module and inputs, autocast's, and the tolerances at unit scale and with large scores.
    None: the results have to be finite, and the weights of a row to sum to 1 or 0.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None
    tolerance: float
    large: float | None

    @property
    def half(self) -> torch.dtype | None:
        """The half precision that results may have."""
        return self.autocast or (self.dtype if self.dtype.itemsize == 2 else None)


@dataclass
class Held:
    """A module of the learner's, and what its layers hold in float64: 4·D rows of matrices, 4 of biases."""

    attention: Any
    heads: int
    width: int
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    dtype: torch.dtype = torch.float32
    fitted: tuple[int, ...] = ()

    def parameters(self) -> list[Tensor]:
        """The parameters of the four layers: weights, then biases."""
        layers = [getattr(self.attention, name) for name in LAYERS]
        return [layer.weight for layer in layers] + [layer.bias for layer in layers]

    def cast(self, dtype: torch.dtype) -> None:
        """Casts the module."""
        if dtype != self.dtype:
            self.attention.to(dtype)
            self.dtype, self.values = dtype, self.values.detach().to(dtype).double()

    def fill(self, numbers: Tensor, how: str, edited: int = 0) -> None:
        """Gives the layers new values, as large as nn.Linear's own; half of .data is set, half edited."""
        values = (numbers * (3 * self.width) ** -0.5).to(self.dtype)
        self.values = values.double()
        matrices, biases = values.split((4 * self.width, 4))
        new = [*matrices.view(4, self.width, self.width), *biases]
        if how == "load":
            self.attention.load_state_dict(dict(zip(NAMES, new, strict=True)), strict=False)
        elif how == "data":
            for place, (parameter, value) in enumerate(zip(self.parameters(), new, strict=True)):
                if (place + edited) % 2:
                    parameter.data.copy_(value)
                else:
                    parameter.data = value.clone()
        else:
            with torch.no_grad():
                for parameter, value in zip(self.parameters(), new, strict=True):
                    parameter.copy_(value)


@dataclass
class State:
    """The learner's modules by heads and width, and what the last calls were given."""

    subject: Subject
    numbers: Tensor
    modules: dict[tuple[int, int], Held] = field(default_factory=dict)
    masked: "Call | None" = None
    called: "Call | None" = None

    def some(self, place: int, *shape: int) -> Tensor:
        """Normal numbers, others for another place: a slice of those drawn once, which costs less than drawing."""
        count, first = math.prod(shape), place % 4999
        return self.numbers[first : first + count].view(shape)


@dataclass
class Call:
    """One call of forward."""

    shape: tuple[int, int]  # heads, width
    sizes: tuple[int, int, int]  # B, Lq, Lk
    kind: Kind
    given: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None
    large: bool = False
    editable: bool = True
    mask_editable: bool = True

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.sizes[0], self.shape[0], self.sizes[1], self.sizes[2]


class Calls(Walk):
    """Calls of modules of several sizes, in any order."""

    # fmt: off
    aspects = (
        Aspect("exact", "1.6", {"": False, "compared to 1e-9": True}),
        Aspect("writes", "1.4", {"": False, "looking for what is written to": True}),
        Aspect("alive", "1.3", {"": False, "looking for what stays alive": True}, 0.03),
        Aspect("scores", "1.5", {"": False, "compute_attention_scores by itself": True}, 0.03),
        Aspect("apply_mask", "1.2", {"": False, "apply_mask by itself": True}, 0.03),
        Aspect("refused", "1.2", {"": False, "after a mask of a bad shape": True}, 0.1),
        Aspect("dropout", "1.5", {
            "": 0.0, "with dropout 0.7": 0.7, "with dropout 0.3": 0.3, "with dropout 1": 1.0,
        }, 0.25),
        Aspect("mask dtype", "1.2", {
            "": torch.bool, "a mask of uint8": torch.uint8, "a mask of int32": torch.int32,
            "a mask of int64": torch.int64, "a mask of float32": torch.float32, "a mask of float64": torch.float64,
        }, 0.6),
        Aspect("kind", "1.7", {
            "": Kind(torch.float64, None, VALUES, VALUES),
            "in float32": Kind(torch.float32, None, 2e-5, 2e-3),
            "in float16": Kind(torch.float16, None, 1e-2, None),
            "in bfloat16": Kind(torch.bfloat16, None, 1e-1, None),
            "under autocast to float16": Kind(torch.float32, torch.float16, 1e-2, None),
            "under autocast to bfloat16": Kind(torch.float32, torch.bfloat16, 1e-1, None),
        }, 0.25),
        Aspect("weights", "1.6", {
            "": "", "after an optimizer's step": "step", "after load_state_dict": "load",
            "after weight.data was set or edited": "data",
        }, 0.2),
        Aspect("again", "1.2", {"": "", "with the last mask again": "same", "with the last mask edited": "edit"}, 0.3),
        Aspect("rows", "1.2", {
            "": "some", "a whole row hidden": "row", "a whole row hidden in one head": "head",
            "everything hidden": "none", "everything allowed": "all",
        }),
        Aspect("padding", "1.2", {"": 0.0, "padded keys of 1e6": 1e6, "padded keys of -1e6": -1e6}, 0.3),
        Aspect("strides", "1.2", {"": "", "an expanded mask": "expand", "a transposed mask": "transpose"}, 0.3),
        Aspect("mask", "1.2", {
            "": "", "a mask [B, 1, 1, Lk]": "keys", "a mask [B, H, Lq, Lk]": "full", "a mask [1, 1, Lq, Lk]": "pairs",
            "a mask [1, H, 1, Lk]": "heads", "a mask [B, 1, Lq, 1]": "queries", "a mask [1, 1, 1, 1]": "one",
            "a causal mask": "causal",
        }, 0.7),
        Aspect("roles", "1.4", {
            "": (0, 1, 2), "key and value one tensor": (0, 1, 1), "all one tensor": (0, 0, 0),
            "query and key one tensor": (0, 0, 2), "query and value one tensor": (0, 1, 0), "overlapping inputs": (),
            "inputs at one address": (0,),
        }),
        Aspect("layout", "1.4", {
            "": "", "inputs [L, B, D].transpose(0, 1)": "transpose", "inputs [D, L, B].permute(2, 1, 0)": "permute",
            "inputs expanded over the batch": "expand", "every second feature of the inputs": "step",
        }, 0.4),
        Aspect("square", "1.4", {"": False, "as many keys as queries": True}, 0.3),
        Aspect("scale", "1.7", {
            "": 0, "large scores": 1, "large scores of the other sign": -1, "large scores of both signs": 2,
        }, 0.4),
        Aspect("lengths", "1.1", {
            "": (5, 7), "1 query": (1, 7), "1 key": (5, 1), "2 queries, 3 keys": (2, 3), "8 queries, 9 keys": (8, 9),
            "9 queries, 8 keys": (9, 8), "3 queries, 16 keys": (3, 16),
        }, 0.6),
        Aspect("long", "1.1", {"": None, "257 queries, 3 keys": (257, 3), "2 queries, 300 keys": (2, 300)}, 0.04),
        Aspect("batch", "1.1", {"": B, "1 batch row": 1, "3 batch rows": 3}, 0.4),
        Aspect("module", "1.6", {
            "": (H, D), "1 head of 8": (1, 8), "6 heads of 1": (6, 6), "5 heads of 4": (5, 20),
        }, 0.3),
        Aspect("inputs", "1.4", {"": "", "with the last inputs edited": "edit"}, 0.1),
        Aspect("modes", "1.6", {"": True, "in eval": False}, 0.4),
        Aspect("graph", "1.6", {"": "grad", "under no_grad": "no_grad", "under inference_mode": "inference"}, 0.4),
        Aspect("gradients", "1.6", {
            "": "", "with all gradients": "all", "with gradients of the weights": "weights",
            "with gradients of the inputs": "inputs",
        }, 0.7),
        Aspect("fresh", "1.6", {"": False, "of a new module": True}, 0.1),
    )
    # fmt: on
    otherwise = "1.6"

    def begin(self, subject: Subject) -> State:
        numbers = torch.randn(24_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return State(subject, numbers)

    def step(self, state: State, step: Step) -> None:
        call = _drawn(state, step)
        held = _held(state, call, step)
        if step["refused"]:
            _refuses(held, call, step.seed)
        if step["scores"] or step["apply_mask"]:
            _parts(state, held, call, step)
            return
        if not step["alive"]:
            _compare(state, held, call, step)
            if call.mask is not None:
                state.masked = call
            if call.editable:
                state.called = call
            return
        seen = Trace()
        _compare(state, held, call, step, seen)
        storages = [weakref.ref(x.untyped_storage()) for x in call.given]
        storages += [weakref.ref(call.mask.untyped_storage())] if call.mask is not None else []
        del call
        if seen.alive_bytes >= 8 * held.width or any(storage() is not None for storage in storages):
            gc.collect()
            assert seen.alive_bytes < 8 * held.width, (
                f"forward: {seen.alive_bytes} bytes stay alive after its results are gone; your code keeps them"
            )
            for name, storage in zip(("query", "key", "value", "mask"), storages, strict=False):
                assert storage() is None, f"forward: {name} stays alive after the call; your code keeps it"


def _held(state: State, call: Call, step: Step) -> Held:
    """The module of a call, in its precision and mode, with its dropout and its weights."""
    held = None if step["fresh"] else state.modules.get(call.shape)
    if held is None:
        heads, width = call.shape
        held = Held(state.subject.MultiHeadAttention(width, heads, dropout=0.5), heads, width)
        held.fill(state.some(0, 4 * width + 4, width), "")
        state.modules[call.shape] = held
    held.cast(call.kind.dtype)
    if step["weights"]:
        held.fill(state.some(step.seed, 4 * held.width + 4, held.width), step["weights"], step.seed)
    if held.attention.training != step["modes"]:
        held.attention.train(step["modes"])
    held.attention.dropout.p = step["dropout"]
    return held


def _drawn(state: State, step: Step) -> Call:
    """What forward is given."""
    fresh = not step["alive"]
    batch, (lq, lk) = step["batch"], step["long"] or step["lengths"]
    if fresh and step["again"] and (last := state.masked) is not None:
        call = Call(last.shape, last.sizes, step["kind"], mask=last.mask, mask_editable=last.mask_editable)
        if step["again"] == "edit" and last.mask_editable:
            assert last.mask is not None, "a call with a mask was remembered"
            last.mask.data.copy_(last.mask == 0)  # So that its version does not tell.
        _inputs(state, call, step)
        return call
    if fresh and step["inputs"] and (last := state.called) is not None:
        call = Call(last.shape, last.sizes, last.kind, last.given, large=last.large)
        for x in {id(x): x for x in call.given}.values():
            x.data.neg_()
    else:
        if step["square"] or 0 in step["roles"][1:]:
            lk = lq = min(lq, lk) if step["long"] else max(2, lq)
        call = Call(step["module"], (batch, lq, lk), step["kind"])
        _inputs(state, call, step)
    if step["mask"]:
        call.mask = _mask(state, call, step)
    return call


def _inputs(state: State, call: Call, step: Step) -> None:
    """Query, key and value."""
    (batch, lq, lk), width, roles, layout = call.sizes, call.shape[1], step["roles"], step["layout"]
    longest = max(lq, lk) + 2
    count = batch * longest * width
    numbers = torch.stack([state.some(step.seed + 1777 * role, count) for role in range(3)])
    sign, rows = step["scale"], None
    call.large = sign != 0
    if sign and call.kind.half is not None:
        numbers.add_(numbers.new_tensor([[1.0], [sign if sign != 2 else 1], [0]]).mul_(9))
    elif sign:
        size = 1000.0 if call.kind.dtype == torch.float64 else 100.0
        same = roles in ((0, 0, 0), (0, 0, 2), (), (0,))
        numbers.add_(numbers.new_tensor([[(3 * size) ** 0.5], [size], [0]] if same else [[3.0], [sign * size], [0]]))
        rows = torch.ones(batch, 1, 1, dtype=torch.float64) if sign == 2 and not same else None
    pieces = numbers.to(call.kind.dtype)
    if not roles:
        base = pieces[0].view(batch, longest, width)
        call.given = [base[:, :lq], base[:, 1 : 1 + lk], base[:, 2 : 2 + lk]]
        call.editable = False
        return
    if roles == (0,):  # Of other strides, then of the same ones: three tensors that autograd tells apart.
        query, key = (pieces[0, : n * batch * width].view(n, batch, width) for n in (lq, lk))
        call.given = [query.view(batch, lq, width), key.transpose(0, 1), key.detach().transpose(0, 1)]
        call.editable = False
        return
    given = [
        _laid_out(piece, (batch, length, width), layout) for piece, length in zip(pieces, (lq, lk, lk), strict=True)
    ]
    if rows is not None and layout != "expand":
        rows[::2] = -1
        given[1].mul_(rows.to(given[1].dtype))
    if lq != lk and roles in ((0, 0, 0), (0, 0, 2), (0, 1, 0)):
        roles = (0, 1, 2)  # A mask that is given again goes with its lengths.
    call.given = [given[role] for role in roles]
    call.editable = layout != "expand"


def _laid_out(piece: Tensor, shape: tuple[int, int, int], layout: str) -> Tensor:
    batch, length, width = shape
    some = piece[: batch * length * width]
    if layout == "transpose":
        return some.view(length, batch, width).transpose(0, 1)
    if layout == "permute":
        return some.view(width, length, batch).permute(2, 1, 0)
    if layout == "expand":
        return piece[: length * width].view(1, length, width).expand(shape)
    if layout == "step":
        return some.repeat_interleave(2).view(batch, length, 2 * width)[..., ::2]
    return some.view(shape)


def _mask(state: State, call: Call, step: Step) -> Tensor:
    """A mask, and keys that it hides in place of some of the call's."""
    kind, rows = step["mask"], step["rows"]
    batch, heads, lq, lk = call.scores
    if kind == "causal":
        mask = torch.ones(1, 1, lq, lk, dtype=torch.bool).tril_()
    else:
        shapes = {"keys": (batch, 1, 1, lk), "full": (batch, heads, lq, lk), "pairs": (1, 1, lq, lk)}
        shapes |= {"heads": (1, heads, 1, lk), "queries": (batch, 1, lq, 1), "one": (1, 1, 1, 1)}
        mask = state.some(step.seed // 7, *shapes[kind]) > -0.25
        if mask.size(-1) > 1:
            mask[..., step.seed % lk] = True
    if rows == "row":
        mask[0, :, -1] = False
    elif rows == "head":
        mask[0, 0, -1] = False
    elif rows in ("none", "all"):
        mask.fill_(rows == "all")
    plain = step["roles"] in ((0, 1, 2), (0, 1, 1)) and step["layout"] != "expand" and not step["inputs"]
    if step["padding"] and kind == "keys" and plain and call.kind.half is None:
        hidden = ~mask[:, 0, 0, :, None]
        for x in {id(x): x for x in call.given[1:]}.values():
            x.masked_fill_(hidden, step["padding"])
        call.editable = False
    mask = mask.to(step["mask dtype"])
    if step["strides"] == "transpose":
        return mask.mT.contiguous().mT
    if step["strides"] == "expand":
        call.mask_editable = False
        return mask.expand(batch, mask.size(1), lq, lk)
    return mask


def _refuses(held: Held, call: Call, number: int) -> None:
    """A mask that fits another call is refused."""
    shape, dim = [size if number >> place & 1 else 1 for place, size in enumerate(call.scores)], number // 16 % 4
    shape[dim] = call.scores[dim] + 1
    if any(size not in (1, full) for size, full in zip(held.fitted, call.scores, strict=False)):
        shape = [*held.fitted]
    what = f"forward with a mask of shape {tuple(shape)} for scores of shape {call.scores}"
    with _autocast(call.kind):
        refuses_mask(lambda: held.attention(*call.given, torch.ones(shape)), what)


def _parts(state: State, held: Held, call: Call, step: Step) -> None:
    """compute_attention_scores and apply_mask by themselves."""
    batch, heads, lq, lk = call.scores
    dtype, close = call.kind.dtype, Close(call.kind.tolerance)
    size = held.width // heads
    q, k = (state.some(step.seed + n, batch, n, heads, size).to(dtype).transpose(1, 2) for n in (lq, lk))
    product = q.double() @ k.double().mT
    if step["scores"]:
        scores = is_tensor(held.attention.compute_attention_scores(q, k), "compute_attention_scores")
        if call.kind.half is not None and scores.dtype == torch.float32:
            scores = scores.to(dtype)  # Half precision may be computed in a wider one from here on.
        close(scores, (product * q.size(-1) ** -0.5).to(dtype), "compute_attention_scores(q, k)")
    if step["apply_mask"]:
        scores = (product * 100).to(dtype)
        mask = state.some(step.seed // 7, batch, 1, lq, lk) > 0
        masked = is_tensor(held.attention.apply_mask(scores.clone(), mask.to(step["mask dtype"])), "apply_mask")
        kept = torch.where(mask, masked, 0)
        close(kept, torch.where(mask, scores, 0), "apply_mask: allowed scores", tolerance=0)
        weights = masked.softmax(-1).masked_fill(mask | ~mask.any(-1, keepdim=True), 0)
        close(weights, torch.zeros_like(scores), "softmax of apply_mask: forbidden weights", tolerance=0)


def _autocast(kind: Kind) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=kind.autocast) if kind.autocast else nullcontext()


def _compare(state: State, held: Held, call: Call, step: Step, seen: Trace | None = None) -> None:
    """Calls forward, and compares what it gives with the formula."""
    asked, graph, mask = step["gradients"], step["graph"], call.mask
    parameters = held.parameters()
    differentiable = graph == "grad" and asked != ""
    leaves = list({id(x): x for x in call.given}.values())
    for x in leaves:
        x.requires_grad_(differentiable and asked != "weights")
    for parameter in parameters:
        parameter.requires_grad_(asked != "inputs")
    values = held.values.requires_grad_(differentiable and asked != "inputs")

    with torch.set_grad_enabled(differentiable):
        want, v = formula(values, held.heads, call.given, mask)
    held.fitted = held.fitted if mask is None else tuple(mask.shape)
    read = [*call.given, *([] if mask is None else [mask]), *parameters]
    versions = [x._version for x in read]
    arguments = call.given if mask is None else [*call.given, mask]
    seed(step.seed)
    with _graph(graph), _autocast(call.kind), seen or nullcontext():
        came = unpack(held.attention(*arguments))
    written = [place for place, x in enumerate(read) if x._version != versions[place]]
    if step["writes"] and written:
        names = ["query", "key", "value", *([] if mask is None else ["mask"]), *NAMES]
        raise AssertionError(f"forward: {names[written[0]]} is written to")

    rate = step["dropout"] if step["modes"] else 0.0
    with torch.set_grad_enabled(differentiable):
        if rate:
            want = dropped(want, came[1], rate)
        wanted = (joined(values, want, v), want)
    tolerance = call.kind.large if call.large else call.kind.tolerance
    if step["exact"] and call.kind.dtype == torch.float64 and not call.large:
        tolerance = PRECISE
    _same(came, wanted, call.kind, tolerance, rate)
    carries = graph == "grad"
    for name, x in zip(("output", "weights"), came, strict=True):
        assert x.requires_grad or not carries or asked == "inputs", f"forward: {name} carries no gradient"
    if differentiable and not written:
        probes = [state.some(step.seed // 11, *x.shape) for x in wanted]
        _same_gradients(held, call, came, wanted, probes, leaves, asked, tolerance)


def _graph(graph: str) -> AbstractContextManager[Any]:
    if graph == "grad":
        return nullcontext()
    return torch.no_grad() if graph == "no_grad" else torch.inference_mode()


def _close(came: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """As Close, in less time."""
    return bool((came - wanted).abs_().sub_(wanted.abs().mul_(tolerance)).max().item() <= tolerance)


def _same(came: Sequence[Tensor], wanted: Sequence[Tensor], kind: Kind, tolerance: float | None, rate: float) -> None:
    """Output and weights are as wanted."""
    for name, x, want in zip(("output", "weights"), came, wanted, strict=True):
        assert x.shape == want.shape, f"forward: {name} of shape {tuple(x.shape)} came, {tuple(want.shape)} was wanted"
        fits = x.dtype == kind.dtype or x.dtype == kind.autocast
        assert fits, f"forward: {name} of {x.dtype} came, {kind.dtype} was wanted"
    flat = torch.cat([x.detach().reshape(-1).double() for x in came])
    if tolerance is None:
        assert flat.isfinite().all(), "forward: output or weights are not finite"
        if not rate:
            sums = came[1].detach().double().sum(-1)
            Close(3e-2)(sums, wanted[1].detach().sum(-1), "forward: sums of the weights")
        return
    want_flat = torch.cat([x.detach().reshape(-1) for x in wanted])
    if not _close(flat, want_flat, tolerance):
        for name, x, want in reversed(list(zip(("output", "weights"), came, wanted, strict=True))):
            hint = FOLLOWS * (name == "output")
            Close(tolerance)(x.double(), want.detach(), f"forward: {name}", hint=hint)


def _same_gradients(
    held: Held,
    call: Call,
    came: Sequence[Tensor],
    wanted: Sequence[Tensor],
    probes: list[Tensor],
    leaves: list[Tensor],
    asked: str,
    tolerance: float | None,
) -> None:
    """Every gradient is as wanted: there, of its shape and dtype, and of its values."""
    inputs = leaves if asked != "weights" else []
    own = [held.values] if asked != "inputs" else []
    expected = torch.autograd.grad(wanted, [*inputs, *own], probes)
    targets = [*inputs, *(held.parameters() if asked != "inputs" else [])]
    grads = torch.autograd.grad(
        came, targets, [p.to(x.dtype) for p, x in zip(probes, came, strict=True)], allow_unused=True
    )
    roles = [next(place for place, x in enumerate(call.given) if x is leaf) for leaf in inputs]
    names = [*(("query", "key", "value")[place] for place in roles), *(NAMES if own else [])]
    for name, grad in zip(names, grads, strict=True):
        assert grad is not None, f"backward: the gradient of {name} is None"
    flat = torch.cat([grad.reshape(-1).double() for grad in grads])
    if tolerance is None or call.kind.half is not None or (call.large and call.kind.dtype != torch.float64):
        assert flat.isfinite().all(), "backward: a gradient is not finite"
        return
    limit = tolerance if call.kind.dtype == torch.float64 else 100 * tolerance
    want_flat = torch.cat([grad.reshape(-1).double() for grad in expected])
    if not _close(flat, want_flat, limit):
        parts = want_flat.split([grad.numel() for grad in grads])
        for name, grad, part in zip(names, grads, parts, strict=True):
            Close(limit)(grad.double(), part.view(grad.shape), f"backward: gradient of {name}")


WALK = Calls()
test_calls_in_any_order = walk_check(WALK, 70)
