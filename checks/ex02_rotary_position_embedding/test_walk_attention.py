"""A walk of the attention (2.3, 2.4, 2.7, 2.8): masks, weights, sizes, dtypes, modes, and what happens between."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Aspect, Close, Step, Subject, Walk, is_tensor, walk_check

from .reference import (
    HALF,
    MASK_DTYPES,
    NEAR,
    ROUGH,
    MadeOf,
    Turns,
    angles_of,
    named,
    none_seen,
    refuses_mask,
    untouched,
)

close = Close(ROUGH)
_all = torch.Tensor.all  # Bound before any submission is loaded.

IN_HALF = 0.1
MODES = {
    "": torch.enable_grad,
    "under no_grad": torch.no_grad,
    "in inference_mode, after the same call outside": torch.inference_mode,
}


@dataclass
class Layer:
    """An attention layer of the learner's, its weights as the check gave them, and how many positions it has seen."""

    attention: Any
    heads: int
    numbers: Tensor  # [4 D + 1, D]: the weights of queries, keys, values and output, and the output's bias
    seen: int = 0

    @property
    def weights(self) -> dict[str, Tensor]:
        """By the given names."""
        names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "o_proj.bias")
        features = self.numbers.size(1)
        *four, bias = self.numbers.split(features)
        return dict(zip(names, (*four, bias[0]), strict=True))


def layer_of(subject: Subject, features: int, heads: int) -> Layer:
    """A fresh layer in float64, with weights of the check's."""
    attention = subject.MultiHeadAttentionWithRoPE(features, heads, 6).double()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        kind = type(getattr(attention, name))
        assert kind is nn.Linear, f"{name}: a {kind.__name__} came, nn.Linear was given"
    numbers = random_weights(features, heads, torch.Generator().manual_seed(features))
    layer = Layer(attention, heads, numbers)
    renew(layer, numbers, "loaded")
    return layer


def random_weights(features: int, heads: int, rng: torch.Generator) -> Tensor:
    """Weights of a layer.

    The last feature of x moves the scores of the first head up, those of the second down, those of the others not: it
    turns queries and keys into the slowest pair.
    """
    numbers = torch.randn(4 * features + 1, features, generator=rng, dtype=torch.float64) / features**0.5
    width = features // heads
    numbers[: 3 * features, -1] = 0
    slow = torch.arange(heads) * width + width // 2 - 1
    numbers[slow, -1] = 1
    numbers[features + slow, -1] = torch.tensor([1.0, -1.0, 0.0]).double().repeat(heads)[:heads]
    return numbers


def renew(layer: Layer, numbers: Tensor, how: str) -> None:
    """Gives a layer other weights."""
    kind = layer.attention.o_proj.weight.dtype
    layer.numbers = numbers.to(kind).double()
    if how == "loaded":
        layer.attention.load_state_dict(layer.attention.state_dict() | layer.weights)
        return
    for name, weight in layer.weights.items():
        parameter = layer.attention.get_parameter(name)
        if how == "data":
            parameter.data = weight.to(kind, copy=True)
        else:
            parameter.detach().copy_(weight)


def formula(layer: Layer, numbers: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """The output of a layer with these weights, in float64."""
    width = x.size(-1) // layer.heads
    features = x.size(-1)
    heads = (x.double() @ numbers[: 3 * features].T).unflatten(-1, (3, layer.heads, width)).permute(2, 0, 3, 1, 4)
    angles = angles_of(torch.arange(x.size(1)), width)
    turn = torch.polar(torch.ones((), dtype=torch.float64).expand(angles.shape), angles)
    pairs = torch.complex(*heads[:2].chunk(2, dim=-1)) * turn
    scores = (pairs[0] @ pairs[1].mH).real / width**0.5
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        hidden = mask == 0
        weights = scores.masked_fill(hidden, -1e300).softmax(dim=-1).masked_fill(hidden, 0.0)
    return (weights @ heads[2]).transpose(1, 2).flatten(2) @ numbers[3 * features : -1].T + numbers[-1]


MASKS = {
    "": "",
    "a causal mask": "causal",
    "a padding mask": "padding",
    "a padding mask over rows of 1e6": "padding of 1e6",
    "a mask per head": "heads",
    "a mask of everything": "everything",
    "a mask per query": "queries",
    "a [1, 1, 1, 1] mask": "one",
}
SHAPES = {
    "causal": "11LL", "padding": "B11L", "padding of 1e6": "B11L", "heads": "1H1L", "everything": "BHLL",
    "queries": "B1L1", "one": "1111",
}  # fmt: skip


def draw_mask(kind: str, sizes: dict[str, int], rng: torch.Generator) -> Tensor:
    """A boolean mask in which every row may attend to something."""
    shape = [sizes[letter] for letter in SHAPES[kind]]
    if kind == "causal":
        return torch.ones(shape, dtype=torch.bool).tril()
    if kind.startswith("padding"):
        kept = torch.randint(1, shape[-1] + 1, (shape[0], 1, 1, 1), generator=rng)
        return torch.arange(shape[-1]) < kept
    mask = torch.rand(shape, generator=rng) > 0.4
    return mask.logical_or_(~mask.any(-1, keepdim=True))


def hide(mask: Tensor, what: str, rng: torch.Generator) -> Tensor:
    """A mask with more hidden: a row, a batch row, a head, or the first keys."""
    rows, keys = mask.shape[2:]
    if what == "row":
        mask[..., int(torch.randint(rows, (), generator=rng)), :] = False
    elif what == "batch":
        mask[-1] = False
    elif what == "head":
        mask[:, -1] = False
    elif what == "first":
        mask[..., : max(1, keys // 2)] = False
    return mask


class Attending(Walk):
    """Calls of an attention layer, and of others beside it."""

    aspects = (
        # What is looked at comes first, and what needs no dtype before dtypes: the first is blamed that is needed.
        Aspect("watched", "2.4", {"": False, "inputs watched for writes": True}),
        Aspect("let go", "2.3", {"": False, "x, mask and output let go afterwards": True}, rate=0.15),
        Aspect("counted", "2.3", {"": False, "cosines and sines counted": True}, rate=0.1),
        Aspect("gradients", "2.4", {"": False, "gradients compared": True}),
        Aspect("exact", "2.7", {"": False, "compared as 2.7 asks": True}),
        Aspect("scores", "2.4", {"": 0, "scores near ±100": 14, "scores near ±1000": 45}, rate=0.4),
        Aspect("scores of", "2.4", {"": slice(None), "in one batch row": slice(1)}),
        Aspect(
            "weights",
            "2.4",
            {
                "": "",
                "with weights changed in place": "in place",
                "with weights loaded": "loaded",
                "with weights assigned to .data": "data",
            },
            rate=0.2,
        ),
        Aspect("again", "2.4", {"": False, "after a call with another mask in the same tensor": True}, rate=0.15),
        Aspect(
            "inference",
            "2.7",
            {
                "": None,
                "after a call in inference_mode": torch.inference_mode,
                "after one under no_grad": torch.no_grad,
            },
            rate=0.15,
        ),
        Aspect(
            "dtype",
            "2.7",
            {"": torch.float64, "in float32": torch.float32, "in bfloat16": HALF[1], "in float16": HALF[0]},
            rate=0.3,
        ),
        Aspect(
            "refused",
            "2.8",
            {
                "": "",
                "after a [B, L] mask, which was refused": "BL",
                "after a [B, 1, 1, L + 1] mask, which was refused": "B11+",
                "after a [B + 1, 1, 1, L] mask, which was refused": "+11L",
                "after an [L, L] mask, which was refused": "LL",
            },
            rate=0.2,
        ),
        Aspect("eval", "2.4", {"": False, "in eval()": True}),
        Aspect("mode", "2.4", MODES, rate=0.35),
        Aspect(
            "hidden",
            "2.4",
            {
                "": "",
                "a row hidden": "row",
                "a batch row hidden": "batch",
                "a head hidden": "head",
                "the first keys hidden": "first",
            },
        ),
        Aspect(
            "mask's dtype",
            "2.4",
            {f"mask of {named(dtype)}" if dtype != torch.bool else "": dtype for dtype in MASK_DTYPES},
        ),
        Aspect(
            "mask's layout",
            "2.4",
            {"": "", "a transposed mask": "transposed", "an expanded mask": "expanded"},
            rate=0.3,
        ),
        Aspect("mask", "2.4", MASKS, rate=0.7),
        Aspect(
            "layer", "2.4", {"": (12, 3), "D=14, H=1": (14, 1), "D=20, H=2": (20, 2), "D=16, H=8": (16, 8)}, rate=0.3
        ),
        Aspect("rows", "2.4", {f"L={rows}" if rows != 5 else "": rows for rows in (5, 1, 2, 8, 9, 17)}),
        Aspect("long", "2.4", {"": 0, "L=260": 260}, rate=0.005),
        Aspect("batch", "2.4", {"": 2, "B=1": 1, "B=3": 3, "B=5": 5}),
        Aspect(
            "layout",
            "2.4",
            {
                "": "",
                "x transposed": "transposed",
                "x expanded over its rows": "rows",
                "x expanded over the batch": "batch",
            },
        ),
    )
    otherwise = "2.4"

    def begin(self, subject: Subject) -> dict[Any, Any]:
        return {"": subject, (12, 3): layer_of(subject, 12, 3)}

    def step(self, state: dict[Any, Any], step: Step) -> None:
        rng, (features, heads), dtype = step.rng(), step["layer"], step["dtype"]
        if step["long"]:
            features, heads = 14, 1
        layer = state.get((features, heads)) or layer_of(state[""], features, heads)
        state[features, heads] = layer
        attention = layer.attention
        if attention.training is step["eval"]:
            attention.train(not step["eval"])
        if attention.o_proj.weight.dtype != dtype:
            attention.to(dtype)
            layer.seen = 0  # A cast may cost a new table.
            layer.numbers = layer.numbers.to(dtype).double()
        sizes = {"B": 1 if step["long"] else step["batch"], "H": heads, "L": step["long"] or step["rows"], "1": 1}
        x, mask, base = self._inputs(step, sizes, features, rng)
        what = f"attention(x{', mask' if mask is not None else ''})"
        given = (x,) if mask is None else (x, mask)
        self._before(layer, step, sizes, x, mask, base)
        old = layer.numbers
        if step["weights"]:
            with step["mode"]():
                attention(*given)
            renew(layer, random_weights(features, heads, rng), step["weights"])
        x.requires_grad_(step["gradients"])
        before = [(tensor._version, tensor.detach().clone()) for tensor in given] if step["watched"] else []
        length = sizes["L"]
        counted = Turns() if step["counted"] and length <= layer.seen else None
        layer.seen = max(layer.seen, length)
        made = MadeOf(**dict(zip(("x", "mask"), given, strict=False))) if step["let go"] else None
        graded = step["gradients"] and step["mode"] is torch.enable_grad and dtype not in HALF
        graded = graded and step["scores"] < 20 and step["mask"] != "padding of 1e6"
        numbers = layer.numbers.detach().requires_grad_(graded)
        with torch.set_grad_enabled(graded):
            expected = formula(layer, numbers, x, mask)

        with step["mode"](), counted or nullcontext(), made or nullcontext():
            output = attention(*given)

        kept = slice(None) if step["mask"] != "padding of 1e6" or mask is None else mask.ne(0)[:, 0, 0]
        self._compare(output, expected, kept, step, what)
        if counted:
            none_seen(counted, f"{what} with {length} rows, after as many")
        tensor = None
        for name, tensor, (version, copy) in zip(("x", "mask"), given, before, strict=False):
            untouched(tensor, version, copy, f"{name} of {what}")
        if graded:
            self._backward(output, expected, kept, x, numbers, layer, what, rng)
        if made:
            tensor = given = before = x = mask = base = output = expected = kept = None  # type: ignore[assignment]
            made.let_go(what)
        if step["weights"]:
            renew(layer, old, "in place")

    def _inputs(
        self, step: Step, sizes: dict[str, int], features: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, the mask, and the tensor that the mask is a view of."""
        dtype, kind = step["dtype"], step["mask"]
        x = torch.randn(sizes["B"], sizes["L"], features, generator=rng, dtype=torch.float64)
        x[..., -1] = 0
        x[step["scores of"], :, -1] = step["scores"]
        mask = base = None
        if kind:
            base = hide(draw_mask(kind, sizes, rng), step["hidden"], rng)
            if kind == "padding of 1e6" and dtype not in HALF:
                x.masked_fill_((~base & base.any(dim=-1, keepdim=True))[:, 0, 0].unsqueeze(-1), 1e6)
            base = base.to(step["mask's dtype"])
            if step["mask's layout"] == "transposed":
                base = base.mT.contiguous().mT
            mask = base.expand([sizes[letter] for letter in "BHLL"]) if step["mask's layout"] == "expanded" else base
        x = x.to(dtype)
        if step["layout"] == "transposed":
            x = x.mT.contiguous().mT
        elif step["layout"] == "rows" and kind != "padding of 1e6":
            x = x[:, :1].expand(x.shape)
        elif step["layout"] == "batch" and kind != "padding of 1e6":
            x = x[:1].expand(x.shape)
        return x, mask, base

    def _before(
        self, layer: Layer, step: Step, sizes: dict[str, int], x: Tensor, mask: Tensor | None, base: Tensor | None
    ) -> None:
        """What happens before the call."""
        attention, (batch, length) = layer.attention, x.shape[:2]
        if step["refused"]:
            more = sizes | {"+": length + 1 if step["refused"] == "B11+" else batch + 1}
            with step["mode"]():
                refuses_mask(attention, x, tuple(more[letter] for letter in step["refused"]), layer.heads)
        if step["inference"]:
            longer = torch.randn(batch, 2 * length, x.size(-1), generator=step.rng(), dtype=torch.float64).to(x.dtype)
            with step["inference"]():
                attention(longer)
            layer.seen = max(layer.seen, 2 * length)
        if step["mode"] is torch.inference_mode:
            attention(
                x, *([] if mask is None else [mask])
            )  # What is made for good is made here, not in inference_mode.
        if step["again"] and mask is not None and base is not None:
            copy = base.clone()
            base.copy_(copy == 0)
            attention(x, mask)
            base.copy_(copy)

    def _compare(self, output: Any, expected: Tensor, kept: Any, step: Step, what: str) -> None:
        tensor, dtype = is_tensor(output, what).detach(), step["dtype"]
        assert tensor.dtype == dtype, f"{what}: {named(tensor.dtype)} came, {named(dtype)} was wanted"
        came, wanted = tensor, expected.detach()
        if came.shape == wanted.shape:
            came, wanted = came[kept], wanted[kept]
        bound = NEAR if step["exact"] and not step["scores"] else ROUGH
        if dtype in HALF:
            if step["scores"]:
                came, wanted = came.isfinite().double(), torch.ones_like(wanted)
            bound = IN_HALF
        if came.shape != wanted.shape or not _all((came - wanted).abs() <= bound * (1 + wanted.abs())):
            close(came.double(), wanted, what, tolerance=bound)
            raise AssertionError(f"{what}: values differ")

    def _backward(
        self, output: Tensor, expected: Tensor, kept: Any, x: Tensor,
        numbers: Tensor, layer: Layer, what: str,
        rng: torch.Generator,
    ) -> None:  # fmt: skip
        """The gradients of x and of every weight are the formula's."""
        assert output.requires_grad, f"{what}: the output carries no gradient"
        probe = torch.zeros_like(expected)
        probe[kept] = torch.randn(probe[kept].shape, generator=rng, dtype=torch.float64)
        wanted, of_numbers = torch.autograd.grad(expected, [x, numbers], probe)
        parameters = {name: layer.attention.get_parameter(name) for name in layer.weights}
        came = torch.autograd.grad(output, [x, *parameters.values()], probe.to(output.dtype), allow_unused=True)
        of_weights = Layer(None, 0, of_numbers).weights.values()
        for name, actual, right in zip(("x", *parameters), came, (wanted.double(), *of_weights), strict=True):
            hint = "the output agrees, its gradient does not: is something detached?"
            gradient = is_tensor(actual, f"{what}, backward: gradient of {name}", hint)
            size = 1 + float(right.abs().max())
            if gradient.shape != right.shape or not _all((gradient - right).abs() <= ROUGH * size):
                close(gradient.double() / size, right / size, f"{what}, backward: gradient of {name}", hint=hint)
                raise AssertionError(f"{what}, backward: gradient of {name}: values differ")


test_attends_in_any_order = walk_check(Attending(), 36)
