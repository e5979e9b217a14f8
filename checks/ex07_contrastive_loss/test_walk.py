"""A walk over calls of the three losses (7.3 to 7.6, 7.8), in which everything is drawn together."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.testing import Aspect, Close, Step, Subject, Trace, Walk, is_tensor, walk_check

from .ranks import Rank, run_ranks
from .reference import CHUNKED, HALVES, NAMES, NEAR, PLAIN, SHARDED, SHARES, Pairs, slices, units

STEPS = 38
MODES: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
BF16, F16 = HALVES
F32, F64 = torch.float32, torch.float64
HUGE = (2**62 + 1, 2**62, -(2**63), 2**63 - 1, 2**53, 2**53 + 1)
GROUPS: dict[str, Callable[[int], list[int]] | None] = {
    "": None,
    "some groups alike": lambda n: [(i * i) % 3 - 1 for i in range(n)],
    "all of one group": lambda n: [-4] * n,
    "all groups different": lambda n: [i * 5 - 7 for i in range(n)],
    "huge ids": lambda n: [HUGE[i % 6] for i in range(n)],
    "a group at both ends": lambda n: [0, *range(1, n - 1), 0][:n],
}


class Losses(Walk):
    """Calls of contrastive_loss, in chunks or over ranks."""

    aspects = (
        Aspect(
            "half",
            "7.8",
            {
                "": None,
                "in bfloat16": (BF16, BF16, BF16),
                "in float16": (F16, F16, F16),
                "rows in bfloat16": (BF16, BF16, F32),
                "images in float16": (F16, F32, F32),
                "texts in bfloat16": (F32, BF16, F32),
                "texts in float16, images in float64": (F64, F16, F32),
                "scale in bfloat16": (F32, F32, BF16),
            },
            rate=0.25,
        ),
        Aspect("autocast", "7.8", {"": None, "under autocast": BF16, "under autocast to float16": F16}, rate=0.2),
        Aspect("watch", "7.4", {"": False, "with a look at what stays": True}, rate=0.3),
        Aspect(
            "ranks",
            "7.6",
            {"": (), "on one rank": (1,), "on 2 ranks": (1, 1), "on 2 unequal ranks": (2, 1), "on 3 ranks": (1, 3, 2)},
            rate=0.22,
        ),
        Aspect(
            "chunks",
            "7.5",
            {"": 0, **{f"in chunks of {size}": size for size in (1, 2, 3, 5, 64)}, "in chunks of the default": 256},
            rate=0.6,
        ),
        Aspect(
            "between",
            "7.3",
            {
                "": "",
                "after a call that failed": "error",
                "after a call under no_grad": "no_grad",
                "after a call under inference_mode": "inference",
                "after a call of other pairs": "other",
                "after a call with the same rows, edited since": "edit",
            },
            rate=0.3,
        ),
        Aspect(
            "backward",
            "7.3",
            {
                "": (1.0,),
                "backward(-2.5)": (-2.5,),
                "a second backward": (1.0, -3.0),
                "another call before backward": (1.0, None),
            },
        ),
        Aspect("groups", "7.3", GROUPS, rate=0.6),
        Aspect(
            "ids", "7.3", {"": "", "every second element of a tensor of ids": "sliced", "ids expanded": "one"}, rate=0.3
        ),
        Aspect(
            "numbers",
            "7.3",
            {
                "": "",
                "logits far above 0": "above",
                "logits far below 0": "below",
                "logits that rise from pair to pair": "rise",
                "rows of very different lengths": "lengths",
                "a row of zeros": "zeros",
                "rows of length 1, scale 100": "sharp",
                "alike rows": "alike",
                "a tiny scale": "tiny",
            },
        ),
        Aspect(
            "size",
            "7.3",
            {
                "": (5, 3),
                "one pair": (1, 3),
                "one pair, one feature": (1, 1),
                "two pairs": (2, 2),
                "one feature": (6, 1),
                "9 pairs": (9, 4),
                "more features than pairs": (3, 7),
            },
        ),
        Aspect(
            "layout",
            "7.3",
            {"": "", **{f"{name} rows": name for name in ("transposed", "sliced", "expanded", "overlapping")}},
        ),
        Aspect("of", "7.3", {"": NAMES[:2], "of images": NAMES[:1], "of texts": NAMES[1:2]}),
        Aspect(
            "roles", "7.3", {"": "", "one tensor in both roles": "one", "two tensors of one memory": "two"}, rate=0.25
        ),
        Aspect("dtype", "7.3", {"": F64, "in float32": F32}, rate=0.3),
        Aspect("mode", "7.3", {"": "", "under no_grad": "no_grad", "under inference_mode": "inference"}, rate=0.2),
        Aspect(
            "asks",
            "7.3",
            {
                "": NAMES,
                **{f"gradients of {name} alone": (name,) for name in NAMES},
                "no gradient of scale": NAMES[:2],
                "no gradient of texts": (NAMES[0], NAMES[2]),
                "no gradients": (),
            },
            rate=0.4,
        ),
    )
    otherwise = "7.3"

    def begin(self, subject: Subject) -> Subject:
        """Functions hold no state that a walk knows of."""
        return subject

    def step(self, state: Subject, step: Step) -> None:
        """One call, and its gradients."""
        drawn = Drawn(state, step)
        drawn.before()
        if drawn.sizes:
            drawn.over_ranks()
        else:
            drawn.alone()


class Drawn:
    """One call as it was drawn."""

    def __init__(self, subject: Subject, step: Step) -> None:
        self.subject, self.step, self.rng = subject, step, step.rng()
        self.sizes, self.chunk = step["ranks"], step["chunks"]
        self.name = SHARDED if self.sizes else CHUNKED if self.chunk else PLAIN
        n, self.e = step["size"]
        self.n = sum(self.sizes) or n
        self.kinds = step["half"] or (step["dtype"],) * 3
        self.exact = self.kinds == (F64, F64, F64)
        self.far = self.exact and step["numbers"] in ("above", "below", "rise", "lengths")
        self.given = self._given()

    @property
    def near(self) -> float:
        """What float64 may be off by."""
        return SHARES if self.given.groups is not None else 1e-7 if self.far else NEAR

    def _given(self) -> Pairs:
        """The rows, scale and ids."""
        step, n = self.step, self.n
        image, text = (torch.randn(n, self.e, generator=self.rng, dtype=F64) for _ in range(2))
        numbers, scale = step["numbers"], 2.0
        steps = torch.arange(n, dtype=F64)[:, None]
        if self.far:
            image, text = {
                "above": (image + 15, text + 15),
                "below": (image - 15, text + 15),
                "rise": (image + 3 * steps, text + 4 * steps),
                "lengths": (image * 3 ** (steps - 2), text * 3 ** (2 - steps)),
            }[numbers]
        elif numbers not in ("", "zeros", "alike", "tiny") or not self.exact:
            image, text = (rows / rows.norm(dim=1, keepdim=True) for rows in (image, text))
            scale = 100.0 if numbers == "sharp" else 14.0
        if numbers == "zeros":
            image[0], text[-1] = 0, 0
        elif numbers == "alike":
            image, text = image[:1].repeat(n, 1), text[:1].repeat(n, 1)
        elif numbers == "tiny":
            scale = 1e-3
        layouts = step["layout"] if not self.sizes else ""
        made = [tensor.to(kind) for tensor, kind in zip((image, text), self.kinds, strict=False)]
        made = [
            laid_out(rows, layouts) if name in step["of"] else rows for name, rows in zip(NAMES, made, strict=False)
        ]
        if step["roles"] and self.kinds[0] == self.kinds[1]:
            made[1] = made[0] if step["roles"] == "one" else made[0].detach()
        ids = None
        if step["groups"] and not self.sizes:
            ids = torch.tensor(step["groups"](n))
            ids = torch.stack((ids, ids + 1), 1)[:, 0] if step["ids"] == "sliced" else ids
            ids = ids[0].expand(n) if step["ids"] == "one" else ids
        return Pairs(made[0], made[1], torch.tensor(scale, dtype=F64).to(self.kinds[2]), ids)

    def call(self, given: Pairs, comm: Rank | None = None) -> Any:
        """The function that was drawn."""
        if comm is not None:
            return self.subject.sharded_contrastive_loss(*given.tensors, comm)
        more = () if given.groups is None else (given.groups,)
        if self.chunk:
            return self.subject.chunked_contrastive_loss(*given.tensors, *more, chunk_size=self.chunk)
        return self.subject.contrastive_loss(*given.tensors, *more)

    def before(self) -> None:
        """What happens before the call."""
        act = self.step["between"]
        if self.sizes or not act:
            return
        if act == "error":
            wrong = Pairs(self.given.image, torch.ones(self.n + 1, self.e), self.given.scale, self.given.groups)
            with contextlib.suppress(ValueError):
                self.call(wrong)
        elif act == "other":
            self.call(Pairs(torch.ones(4, 2), torch.ones(4, 2), torch.tensor(1.0)).leaves())
        elif act == "edit" and self.step["layout"] in ("", "transposed"):
            kept = [rows.clone() for rows in self.given.tensors]
            for tensor in self.given.tensors:
                tensor.mul_(-0.5)
            self.call(self.given)
            for tensor, values in zip(self.given.tensors, kept, strict=True):
                tensor.copy_(values)
        else:
            with MODES[act if act in MODES else "no_grad"]():
                self.call(self.given)

    def asking(self) -> tuple[str, ...]:
        """What asks for gradients."""
        return () if self.step["mode"] else self.step["asks"]

    def one(self, leaves: Pairs, comm: Rank | None = None) -> tuple[Tensor, list[list[Tensor | None]]]:
        """A call and its backwards: the loss, and the gradients of each backward."""
        step, asking = self.step, self.asking()
        before = [(tensor._version, tensor.detach().clone()) for tensor in leaves.tensors]
        ids = 0 if leaves.groups is None else leaves.groups._version
        with contextlib.ExitStack() as stack:
            stack.enter_context(MODES[step["mode"]]())
            if step["autocast"] is not None:
                stack.enter_context(torch.autocast("cpu", dtype=step["autocast"]))
            loss = is_tensor(self.call(leaves, comm), self.name)
        for name, tensor, (version, values) in zip(NAMES, leaves.tensors, before, strict=True):
            same = tensor._version == version and torch.equal(tensor, values)
            assert same, f"{self.name}: writes to {name}, if only to put it back"
        assert leaves.groups is None or leaves.groups._version == ids, f"{self.name}: writes to groups"
        if not asking:
            assert not loss.requires_grad, f"{self.name}: the loss carries a gradient, although nothing asks for one"
            return loss, []
        assert loss.requires_grad, f"{self.name}: the loss carries no gradient; {', '.join(asking)} ask for one"
        factors, found = step["backward"], []
        if None in factors and comm is None:
            self.call(Pairs(-leaves.image, leaves.text.flip(0), leaves.scale, leaves.groups).leaves()).backward()
        factors = [factor for factor in factors if factor is not None]
        for place, factor in enumerate(factors):
            for leaf in leaves.tensors:
                leaf.grad = None
            loss.backward(torch.tensor(factor, dtype=loss.dtype), retain_graph=place + 1 < len(factors))
            found.append([leaf.grad for leaf in leaves.tensors])
        return loss.detach(), found

    def alone(self) -> None:
        """A call without ranks, compared."""
        watched = self.step["watch"] and self.chunk and self.step["autocast"] is None
        leaves = self.given.leaves(self.asking())
        if watched:
            with Trace() as seen:
                loss, found = self.one(leaves)
        else:
            loss, found = self.one(leaves)
        self.compare(loss, found)
        if watched:
            del loss, found
            for leaf in leaves.tensors:
                leaf.grad = None
            left = seen.alive_after_collection()
            assert left == 0, f"{self.name}: {left} bytes are alive once the loss is let go; nothing was wanted"

    def over_ranks(self) -> None:
        """A call on each rank, whose means are compared."""
        rows = list(slices(self.sizes))

        def step(comm: Rank) -> tuple[Tensor, list[list[Tensor | None]]]:
            part = self.given.part(rows[comm.rank])
            if self.given.text is self.given.image:
                part = Pairs(part.image, part.image, part.scale)
            return self.one(part.leaves(self.asking()), comm)

        found = run_ranks(step, len(rows))
        shapes = {tuple(loss.shape) for loss, _ in found}
        assert shapes == {()}, f"{self.name}: losses of the shapes {sorted(shapes)} came, () was wanted"
        mean = torch.stack([loss for loss, _ in found]).mean(0)
        together: list[list[Tensor | None]] = []
        for grads in zip(*(each for _, each in found), strict=True):
            images, texts, scales = zip(*grads, strict=True)
            together.append([
                *(None if None in of else torch.cat(of) / len(rows) for of in (images, texts)),
                None if None in scales else torch.stack(scales).mean(0),
            ])  # fmt: skip
        self.compare(mean, together)

    def compare(self, loss: Tensor, found: list[list[Tensor | None]]) -> None:
        """Loss and gradients are the formula's."""
        wanted, gradients = self.given.exact()
        assert loss.shape == (), f"{self.name}: shape {tuple(loss.shape)} came, () was wanted"
        if self.exact:
            assert loss.dtype == F64, f"{self.name}: {loss.dtype} came for rows in float64"
        else:
            assert loss.dtype in (F32, F64), f"{self.name}: {loss.dtype} came, float32 or better was wanted"
        off, right = abs(float(loss) - float(wanted)), float(wanted)
        near = self.near * (1 + abs(right)) if self.exact else 1e-4 * max(1.0, right)
        assert off <= near, (
            f"{self.name}: a loss of {float(loss):.8g}, {right:.8g} was wanted; {off:.2g} apart, {near:.2g} is allowed"
        )
        factors = [factor for factor in self.step["backward"] if factor is not None]
        for time, (grads, factor) in enumerate(zip(found, factors, strict=False)):
            for place, name in enumerate(NAMES):
                if name not in self.asking() and not (
                    self.given.text is self.given.image and place < 2 and set(self.asking()) & {*NAMES[:2]}
                ):
                    continue
                self.gradient(grads[place], gradients[name] * factor, name, "second backward" if time else "backward")

    def gradient(self, came: Tensor | None, right: Tensor, name: str, when: str) -> None:
        """One gradient."""
        what = f"{self.name}, {when}: gradient of {name}"
        assert came is not None, f"{what}: none came"
        kind = self.kinds[NAMES.index(name)]
        form = tuple(came.shape), came.dtype
        assert form == (tuple(right.shape), kind), f"{what}: {form} came, {(tuple(right.shape), kind)} was wanted"
        if self.exact:
            Close(self.near * (10 if self.far else 1))(came, right, what)
            return
        limit, largest = units(float(right.abs().max()), kind), float(right.abs().max())
        if self.given.text is self.given.image or self.sizes:
            limit *= 4  # Of one tensor in both roles two gradients are rounded, on ranks the mean is.
        gap = float((came.double() - right).abs().nan_to_num(math.inf).max())
        assert gap <= limit, (
            f"{what}: off by {gap:.3g}, at most {limit:.2g} is asked for; its largest entry is {largest:.3g}"
        )


def laid_out(rows: Tensor, layout: str) -> Tensor:
    """The same shape by other strides; expanded and overlapping ones hold other numbers too."""
    if layout == "transposed":
        return rows.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack((rows, rows), -1)[..., 0]
    if layout == "expanded":
        return rows[:1].expand(rows.shape)
    if layout == "overlapping":
        return rows.flatten().as_strided(rows.shape, (1, 1))
    return rows


test_calls_in_any_order = walk_check(Losses(), STEPS)
