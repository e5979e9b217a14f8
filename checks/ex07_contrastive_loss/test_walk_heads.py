"""A walk over calls of a few heads (7.1, 7.2, 7.8), in which everything is drawn together."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Aspect, Close, Step, Subject, Trace, Walk, walk_check

from .reference import HALVES, HEAD
from .test_head import called, unit
from .test_walk import MODES, laid_out

STEPS = 25
F32, F64 = torch.float32, torch.float64
NEAR = {F64: 1e-9, F32: 1e-5, HALVES[0]: 5e-2, HALVES[1]: 5e-2}


@dataclass
class Heads:
    """The heads of a walk, made when they are first called."""

    subject: Subject
    made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def new(self, sizes: tuple[int, int, int], max_scale: float, rng: torch.Generator) -> Any:
        """A head of float64, with weights of the check's own."""
        head = self.subject.ContrastiveHead(*sizes, max_scale=max_scale).double()
        refill(head, rng)
        return head

    def at(self, sizes: tuple[int, int, int], max_scale: float) -> Any:
        """The head of some sizes and bound."""
        key = (*sizes, max_scale)
        if key not in self.made:
            self.made[key] = self.new(sizes, max_scale, torch.Generator().manual_seed(3))
        return self.made[key]


def refill(head: Any, rng: torch.Generator, data: bool = False) -> None:
    """New weights that no cast changes, in place."""
    with torch.no_grad():
        for layer in (head.image_proj, head.text_proj):
            values = (torch.randn(layer.weight.shape, generator=rng, dtype=F64) * 16).round().clamp(-100, 100) / 16
            values[values == 0] = 0.25  # Nothing is projected to zeros.
            (layer.weight.data if data else layer.weight).copy_(values)


class Calls(Walk):
    """Calls of ContrastiveHead."""

    aspects = (
        Aspect("half", "7.8", {"": None, "in bfloat16": HALVES[0], "in float16": HALVES[1]}, rate=0.2),
        Aspect(
            "autocast", "7.8", {"": None, "under autocast": HALVES[0], "under autocast to float16": HALVES[1]}, rate=0.2
        ),
        Aspect(
            "raw",
            "7.2",
            {
                "": 2.0,
                "logit_scale 0": 0.0,
                "logit_scale -6": -6.0,
                "logit_scale a little beyond its bound": "beyond",
                "logit_scale 1000": 1000.0,
                "logit_scale a little below its bound": "below",
            },
        ),
        Aspect(
            "bound", "7.2", {"": 100.0, "max_scale 3": 3.0, "max_scale 0.25": 0.25, "max_scale 5000": 5000.0}, rate=0.3
        ),
        Aspect("frozen", "7.2", {"": False, "logit_scale frozen": True}, rate=0.2),
        Aspect("fixed", "7.1", {"": False, "projections frozen": True}, rate=0.2),
        Aspect(
            "between",
            "7.1",
            {
                "": "",
                "after new weights": "step",
                "after new weights by .data": "data",
                "after load_state_dict": "load",
                "after new projections": "layer",
                "after a cast there and back": "cast",
                "after a call of another head": "other",
                "after features that do not fit": "error",
                "after a call under inference_mode": "inference",
            },
        ),
        Aspect("watch", "7.1", {"": False, "with a look at what stays": True}, rate=0.3),
        Aspect("again", "7.1", {"": False, "a second backward": True}, rate=0.3),
        Aspect("size", "7.1", {"": (5, 4, 3), "one feature": (1, 1, 1), "E = 1": (3, 2, 1), "E = 8": (2, 3, 8)}),
        Aspect("n", "7.1", {"": 5, "one pair": 1, "two pairs": 2, "11 pairs": 11}),
        Aspect(
            "layout",
            "7.1",
            {"": "", **{f"{name} features": name for name in ("transposed", "sliced", "expanded", "overlapping")}},
        ),
        Aspect(
            "rows",
            "7.1",
            {"": "", "a row of zeros": "zeros", "rows of very different lengths": "lengths", "large features": "large"},
        ),
        Aspect("roles", "7.1", {"": False, "one tensor in both roles": True}, rate=0.2),
        Aspect("dtype", "7.1", {"": F64, "in float32": F32}, rate=0.3),
        Aspect("flag", "7.1", {"": True, "in eval": False}, rate=0.4),
        Aspect("mode", "7.1", {"": "", "under no_grad": "no_grad", "under inference_mode": "inference"}, rate=0.2),
        Aspect("asks", "7.1", {"": True, "features without gradient": False}, rate=0.3),
    )
    otherwise = "7.1"

    def begin(self, subject: Subject) -> Heads:
        """No head yet."""
        return Heads(subject)

    def step(self, state: Heads, step: Step) -> None:
        """One call of one head, and its gradients."""
        rng, kind = step.rng(), step["half"] or step["dtype"]
        sizes = step["size"]
        if step["roles"]:
            sizes = (sizes[0], sizes[0], sizes[2])
        head = state.at(sizes, step["bound"])
        given = features(step, sizes, kind, rng)
        head.train(step["flag"])
        between(state, head, step, rng, kind)
        raw = step["raw"]
        with torch.no_grad():
            held = {"beyond": math.log(step["bound"]) + 0.3, "below": math.log(step["bound"]) - 0.3}
            head.logit_scale.fill_(held.get(raw, raw))
        head.logit_scale.requires_grad_(not step["frozen"])
        for layer in (head.image_proj, head.text_proj):
            layer.weight.requires_grad_(not step["fixed"])
        compare(head, step, given, kind, rng)


def features(step: Step, sizes: tuple[int, int, int], kind: torch.dtype, rng: torch.Generator) -> list[Tensor]:
    """Those of images and texts."""
    made = []
    for width in sizes[:2]:
        x = torch.randn(step["n"], width, generator=rng, dtype=F64)
        x = x + x.sign()
        if step["rows"] == "zeros":
            x[0] = 0
        elif step["rows"] == "lengths":
            x = x * torch.logspace(-2, 2, len(x), dtype=F64)[:, None]
        elif step["rows"] == "large":
            x = x * (1e6 if kind == F64 else 1e3)
        made.append(laid_out(x.to(kind), step["layout"]).requires_grad_(step["asks"]))
    return [made[0], made[0]] if step["roles"] else made


def between(state: Heads, head: Any, step: Step, rng: torch.Generator, kind: torch.dtype) -> None:
    """What happens to a head before it is called."""
    act, sizes = (
        step["between"],
        (head.image_proj.in_features, head.text_proj.in_features, head.image_proj.out_features),
    )
    if act:
        with MODES[step["mode"] or ("inference" if act == "inference" else "no_grad")]():
            dtype = head.image_proj.weight.dtype
            head(*(torch.ones(2, width, dtype=dtype) for width in sizes[:2]))
    if act == "cast":
        head.to(F32 if kind != F32 else F64)
    if head.image_proj.weight.dtype != kind:
        head.to(kind)
    if act in ("step", "data"):
        refill(head, rng, act == "data")
    elif act == "load":
        head.load_state_dict(state.new(sizes, step["bound"], rng).state_dict())
    elif act == "layer":
        for name, width in (("image_proj", sizes[0]), ("text_proj", sizes[1])):
            setattr(head, name, nn.Linear(width, sizes[2], bias=False, dtype=kind))
        refill(head, rng)
    elif act == "other":
        state.at((2, 3, 4), 7.0)(torch.ones(2, 2, dtype=F64), torch.ones(2, 3, dtype=F64))
    elif act == "error":
        with contextlib.suppress(Exception):
            head(torch.ones(2, sizes[0] + 1, dtype=kind), torch.ones(2, sizes[1], dtype=kind))


def compare(head: Any, step: Step, given: list[Tensor], kind: torch.dtype, rng: torch.Generator) -> None:
    """Calls, and compares all that can be seen."""
    weights = [layer.weight.detach().clone() for layer in (head.image_proj, head.text_proj)]
    raw, starts = float(head.logit_scale), [(x._version, x.detach().clone()) for x in given]
    with contextlib.ExitStack() as stack:
        stack.enter_context(MODES[step["mode"]]())
        if step["autocast"] is not None:
            stack.enter_context(torch.autocast("cpu", dtype=step["autocast"]))
        # What autocast keeps of weights is autocast's own.
        seen = stack.enter_context(Trace()) if step["watch"] and step["autocast"] is None else None
        *rows, scale = called(head, given[0], given[1])
    low = kind in HALVES or (step["autocast"] is not None and kind == F32)
    wide = {F64} if kind == F64 else {F32, F64}
    leaves = [x.detach().double() for x in (*given, *weights)]
    wanted = [unit(leaves[0], leaves[2]), unit(leaves[1], leaves[3])]
    for name, came, right in zip(("image rows", "text rows"), rows, wanted, strict=True):
        assert came.dtype in wide, (
            f"{HEAD}: {name} have {came.dtype}, {'float64' if kind == F64 else 'float32 or better'} was wanted"
        )
        near = 5e-2 if low else NEAR[kind]
        Close(near)(came.detach().double(), right, f"{HEAD}: {name}")
        length = came.detach().double().norm(dim=1)
        off = float(torch.where(right.any(1), length - 1, length).abs().max())
        assert off <= (1e-9 if kind == F64 else 1e-5), f"{HEAD}: {name}: a length is off by {off:.2g}"
    bound, beyond = step["bound"], raw > math.log(step["bound"])
    right_scale = bound if beyond else math.exp(raw)
    loose = 4e-2 if kind in HALVES else 1e-3 if beyond else 1e-9 if kind == F64 else 1e-5
    assert scale.dtype in wide and scale.shape == (), f"{HEAD}: scale {scale.dtype} {tuple(scale.shape)} came"
    assert abs(float(scale) - right_scale) <= loose * right_scale, (
        f"{HEAD}, max_scale {bound:g}, logit_scale {raw:g}: scale {float(scale):.8g} came, {right_scale:.8g} was wanted"
    )
    gradients(head, step, given, leaves, rows, wanted, scale, low or kind in HALVES, rng, (raw, beyond))
    for x, (version, values) in zip(given, starts, strict=True):
        assert x._version == version and torch.equal(x, values), f"{HEAD}: writes to the features"
    for layer, values in zip((head.image_proj, head.text_proj), weights, strict=True):
        assert torch.equal(layer.weight, values), f"{HEAD}: writes to a projection's weight"
    if not beyond:
        assert float(head.logit_scale) == raw, f"{HEAD}: logit_scale {raw:g} is within its bound and was written to"
    if seen is not None:
        head.zero_grad()
        for x in given:
            x.grad = None
        del rows, scale, came
        left = seen.alive_after_collection()
        assert left == 0, f"{HEAD}: {left} bytes stay alive after a call; the module keeps nothing but its parameters"


def by_hand(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of features and weight, from that of the unit rows: what is along a row does not count."""
    rows = x @ weight.mT
    length = rows.norm(dim=1, keepdim=True)
    length[length == 0] = 1.0
    rows = rows / length
    of_rows = (grad - rows * (rows * grad).sum(1, keepdim=True)) / length
    return of_rows @ weight, of_rows.mT @ x


def gradients(
    head: Any, step: Step, given: list[Tensor], leaves: list[Tensor], rows: list[Tensor], wanted: list[Tensor],
    scale: Tensor, low: bool, rng: torch.Generator, held: tuple[float, bool],
) -> None:  # fmt: skip
    """Those of features, projections and logit_scale."""
    if step["mode"]:
        return
    raw, beyond = held
    probes = [torch.randn(right.shape, generator=rng, dtype=F64) for right in wanted]
    (of_image, of_image_proj), (of_text, of_text_proj) = (
        by_hand(leaves[place], leaves[2 + place], probes[place]) for place in (0, 1)
    )
    if step["roles"]:
        of_image = of_text = of_image + of_text
    asking = step["asks"] or not step["fixed"]
    assert all(one.requires_grad == asking for one in rows), f"{HEAD}: the rows' requires_grad is {not asking}"
    assert scale.requires_grad != step["frozen"], f"{HEAD}: the scale's requires_grad is {scale.requires_grad}"
    total = sum((came.double() * probe).sum() for came, probe in zip(rows, probes, strict=True)) - 2 * scale.double()
    names = ["image features", "text features", "image_proj.weight", "text_proj.weight"]
    tensors = [*given, head.image_proj.weight, head.text_proj.weight]
    if not total.requires_grad:
        return
    for again in (True, False) if step["again"] else (False,):
        for tensor in (*tensors, head.logit_scale):
            tensor.grad = None
        total.backward(retain_graph=again)
    for name, tensor, right in zip(names, tensors, (of_image, of_text, of_image_proj, of_text_proj), strict=True):
        if not tensor.requires_grad:
            continue
        assert tensor.grad is not None, f"{HEAD}, backward: {name} get no gradient"
        assert tensor.grad.dtype == tensor.dtype, f"{HEAD}, backward: the gradient of {name} has {tensor.grad.dtype}"
        assert tensor.grad.shape == tensor.shape, (
            f"{HEAD}, backward: the gradient of {name} is {tuple(tensor.grad.shape)}"
        )
        near = 1e-8 if tensor.dtype == F64 else 5e-2 if low else 1e-4
        if step["rows"] in ("zeros", "lengths") and ("features" in name or low):
            continue  # A row of zeros has no gradient that is right, a short one a very large one.
        size = max(1.0, float(right.abs().max()))
        Close(near)(tensor.grad.double() / size, right / size, f"{HEAD}, backward: gradient of {name}, over {size:.3g}")
    came = head.logit_scale.grad
    if not step["frozen"]:
        told = "none" if came is None else f"{float(came):.6g}"
        right_sign = came is not None and math.isfinite(float(came)) and float(came) < 0
        exact = beyond or (came is not None and abs(float(came) / -2 - math.exp(raw)) <= 4e-2 * math.exp(raw))
        assert right_sign and exact, (
            f"{HEAD}, logit_scale {raw:g}, backward(-2) of scale: the gradient of logit_scale is {told}; "
            f"{'a finite one below 0' if beyond else f'{-2 * math.exp(raw):.6g}'} was wanted"
        )


test_heads_in_any_order = walk_check(Calls(), STEPS)
