"""A walk over calls of whole models (8.3 to 8.9), in which everything is drawn together."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.testing import Aspect, Close, Step, Subject, Trace, Walk, is_tensor, walk_check

from .reference import (
    IGNORED,
    IMAGE,
    VOCABULARY,
    Bare,
    Batch,
    Built,
    Expected,
    Tower,
    build,
    continued,
    ended,
    expect,
    padded,
    ran,
    randomize,
    shown,
    value,
)

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
MODES: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
TRAINED = {0: ("vision", "projector", "decoder"), 1: ("projector",), 2: ("projector", "decoder")}


@dataclass
class Held:
    """A model of the learner's, its stage, and the mode that it was last put in."""

    built: Built
    stage: int = 0
    training: bool = True


@dataclass
class Models:
    """The models of a walk, made when they are first called."""

    subject: Subject
    held: dict[tuple[Any, ...], Held] = field(default_factory=dict)

    def at(self, step: Step) -> Held:
        """The model of a step; one that has a stage is another."""
        key = step["tower"], step["placeholder"], step["stage"] > 0
        if key not in self.held:
            rng = torch.Generator().manual_seed(len(self.held) + 1)
            tower = Bare() if not step["tower"] else Tower(rng, step["tower"])
            built = build(self.subject, rng, tower, step["tower"] != 1, step["placeholder"], scale=0.7)
            self.held[key] = Held(built)
        return self.held[key]


class Calls(Walk):
    """Calls of a few models."""

    # fmt: off
    aspects = (
        Aspect("writes", "8.3", {"": False, "looking at what is written to": True}),
        Aspect("counts", "8.8", {"": False, "counting calls": True}, 0.3),
        Aspect("alive", "8.8", {"": False, "looking for what stays alive": True}, 0.04),
        Aspect("generates", "8.7", {"": 0, "one new token": 1, "3 new tokens": 3}, 0.25),
        Aspect("eos", "8.7", {"": None, "with an end token": 0, "with a later end token": 1}, 0.3),
        Aspect("labels", "8.4", {
            "": "", "with labels": "some", "with labels everywhere": "all", "with one label": "one",
            "with labels that are all -100": "none", "with the ids as labels": "ids",
        }, 0.4),
        Aspect("reads", "8.5", {"": False, "with logits": True}, 0.3),
        Aspect("stage", "8.6", {"": 0, "in stage 1": 1, "in stage 2": 2}, 0.25),
        Aspect("flag", "8.6", {"": None, "after train()": True, "after eval()": False}, 0.4),
        Aspect("dtypes", "8.9", {
            "": (DOUBLE, DOUBLE, DOUBLE, DOUBLE),
            "all in float32": (SINGLE, SINGLE, SINGLE, SINGLE),
            "tower float32, projector float64, decoder float32": (SINGLE, DOUBLE, SINGLE, DOUBLE),
            "tower float64, projector float32, images bfloat16": (DOUBLE, SINGLE, DOUBLE, HALF),
            "tower bfloat16, decoder float32": (HALF, DOUBLE, SINGLE, SINGLE),
        }, 0.2),
        Aspect("mask", "8.3", {
            "": torch.int64, "a mask of bool": torch.bool, "a mask of uint8": torch.uint8,
            "a mask of int32": torch.int32, "a mask of float64": DOUBLE, "a mask of float32": SINGLE,
        }, 0.3),
        Aspect("padding", "8.5", {
            "": None, "padding right": (0, 2), "padding left": (2, 0), "padding on both sides": (1, 1),
            "padding on either side": (-1, -1), "all but one id hidden": (9, 0), "a mask of ones": (0, 0),
        }, 0.6),
        Aspect("hidden", "8.5", {"": 0, "placeholders under padding": 1, "no ids under padding": -1}, 0.5),
        Aspect("side", "8.5", {"": "right", "padding_side left": "left"}, 0.4),
        Aspect("images", "8.3", {
            "": 0.25, "no images": 0.0, "many images": 0.7, "images alone": 1.0, "an image first": "first",
            "an image last": "last",
        }),
        Aspect("placeholder", "8.3", {"": -200, "placeholder 4": 4}, 0.1),
        Aspect("tower", "8.3", {
            "": 3, "one token an image, rotary positions": 1, "a tower without parameters": 0,
        }, 0.2),
        Aspect("scale", "8.3", {"": 0.0, "images near 100": 100.0, "images near -100": -100.0}, 0.2),
        Aspect("rows", "8.3", {"": 3, "one row": 1, "rows that are one in memory": 0}, 0.3),
        Aspect("length", "8.3", {"": 4, "one id a row": 1, "9 ids a row": 9}, 0.4),
        Aspect("layout", "8.3", {"": False, "strided inputs": True}, 0.4),
        Aspect("mode", "8.3", {"": "", "under no_grad": "no_grad", "under inference_mode": "inference"}, 0.3),
        Aspect("before", "8.3", {
            "": "", "after new weights by .data": "data", "after load_state_dict": "load", "after a call that failed":
            "error", "after a cast there and back": "cast", "after a call with other rows": "other",
        }, 0.5),
    )
    # fmt: on
    otherwise = "8.3"

    def begin(self, subject: Subject) -> Models:
        """No model yet."""
        return Models(subject)

    def step(self, state: Models, step: Step) -> None:
        """One merge, and what else is drawn."""
        held, rng = state.at(step), step.rng()
        before(held, step, rng)
        given = drawn(held.built, step, rng)
        call = Call(held, given, step)
        copies = given.copies()
        call.merges()
        if step["reads"]:
            call.reads()
        if step["labels"]:
            call.learns()
        if step["generates"] and step["placeholder"] < 0 and not call.low:
            call.generates()
        if step["alive"]:
            call.lets_go()
        for name, (now, copy, version) in copies.items() if step["writes"] else ():
            assert torch.equal(now, copy), f"{name} has changed"
            assert now.is_inference() or now._version == version, f"{name} is written to, if only to be put back"
        call.left()


def before(held: Held, step: Step, rng: torch.Generator) -> None:
    """What happens to a model before it is called."""
    built, act = held.built, step["before"]
    if step["stage"]:
        built.model.set_stage(step["stage"])
        held.stage = step["stage"]
    if step["flag"] is not None:
        built.model.train(step["flag"])
        held.training = step["flag"]
    if act == "data":
        for parameter in built.parameters().values():
            randomize(rng, noise := parameter.data.clone(), scale=0.1)
            parameter.data.mul_(0.95).add_(noise)
    elif act == "load":
        kept = built.model.state_dict()
        built.model.load_state_dict({k: -0.9 * v if v.is_floating_point() else v for k, v in kept.items()})
    elif act == "error":
        images = torch.zeros(7, *IMAGE, dtype=DOUBLE)
        for call in (built.model.merge, built.model.generate):
            with contextlib.suppress(Exception):
                call(torch.tensor([[1, 2]]), images)
    elif act == "cast":
        built.model.float().double()
    elif act == "other":
        with MODES[step["mode"]](), torch.no_grad():
            built.model.merge(torch.tensor([[1, 2, 3, 5, 6]]))
    parts = built.tower, built.model.projector, built.decoder
    for part, dtype in zip(parts, step["dtypes"], strict=False):
        part.to(dtype)
    built.decoder.seen = []
    built.tower.seen.clear()
    built.model.zero_grad()


def drawn(built: Built, step: Step, rng: torch.Generator) -> Batch:
    """The step's inputs; every row has a token, and every visible placeholder an image."""
    rows, length = step["rows"] or 2, step["length"]
    numbers = torch.rand(rows, length, generator=rng)
    ids = torch.randint(VOCABULARY - 2, (rows, length), generator=rng)
    ids[ids >= built.placeholder] += built.placeholder >= 0
    share = step["images"]
    if isinstance(share, str):
        ids[:, 0 if share == "first" else -1] = built.placeholder
    else:
        ids[numbers < share] = built.placeholder
    given = Batch(ids)
    if step["padding"] is not None:
        mask = torch.ones(rows, length, dtype=torch.int64)
        for row in range(rows):
            left, right = step["padding"]
            if left < 0:
                left, right = (0, 2) if row % 2 else (2, 0)
            if step["rows"] and row == rows - 1 and left < 9 and rows > 1:
                left, right = max(left - 1, 0), max(right - 1, 0)
            left = min(left, length - 1)
            right = min(right, length - 1 - left)
            mask[row, :left] = 0
            mask[row, length - right :] = 0
        if step["hidden"]:
            ids[mask == 0] = built.placeholder if step["hidden"] > 0 else 10**7
        given.mask = mask.to(step["mask"])
    if step["rows"] == 0:
        ids = ids[:1].expand(2, -1)
        given.ids = ids
        given.mask = None if given.mask is None else given.mask[:1].expand(2, -1)
    count = int(((ids == built.placeholder) & given.visible()).sum())
    images = torch.randn(count, *IMAGE, generator=rng, dtype=DOUBLE) + step["scale"]
    given.images = None if not count and length % 2 else images.to(step["dtypes"][3])
    given.labels = made_labels(given, step["labels"], rng)
    if step["layout"]:
        for name in ("ids", "mask", "labels", "images"):
            if (x := getattr(given, name)) is not None and step["rows"]:
                setattr(given, name, torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 1])
    return given


def made_labels(given: Batch, kind: str, rng: torch.Generator) -> Tensor | None:
    """Labels of a kind."""
    if not kind:
        return None
    if kind == "ids":
        return given.ids if int(given.ids.max()) < VOCABULARY else given.ids.clamp(max=VOCABULARY - 1)
    labels = torch.randint(VOCABULARY, given.ids.shape, generator=rng)
    if kind == "none":
        return torch.full_like(labels, IGNORED)
    if kind == "one":
        keep = torch.zeros_like(labels, dtype=torch.bool)
        keep[-1, -1] = True
    else:
        keep = torch.rand(labels.shape, generator=rng) < (2 if kind == "all" else 0.6)
    return labels.where(keep, IGNORED)


@dataclass
class Call:
    """A batch that a model is called with."""

    held: Held
    given: Batch
    step: Step

    def __post_init__(self) -> None:
        self.built = self.held.built
        self.grads = not self.step["mode"] and bool(self.step["labels"])
        self.expected: Expected = expect(self.built, self.given, self.run, gradients=self.grads)
        self.low = HALF in self.step["dtypes"] or SINGLE in self.step["dtypes"]
        # Images of bfloat16 are exact; a tower of it rounds what it gives.
        coarse = HALF in self.step["dtypes"][:3]
        self.close = Close(0.2 if coarse else 1e-3 if self.low else 1e-9)
        self.dtype = self.step["dtypes"][2]

    @property
    def run(self) -> bool:
        """With logits."""
        return bool(self.step["reads"] or self.step["labels"])

    def inside(self) -> Any:
        """The mode of the call."""
        return MODES[self.step["mode"]]()

    def merges(self) -> None:
        """merge, on the side that is drawn."""
        side, given, lengths = self.step["side"], self.given, self.expected.lengths
        what = f"merge(…, padding_side={side!r})" if side == "left" else "merge"
        with self.inside():
            found = self.built.model.merge(given.ids, given.images, given.mask, given.labels, padding_side=side)
        keep = shown(lengths, side)
        mask = is_tensor(getattr(found, "attention_mask", None), f"{what}: attention_mask")
        assert mask.dtype == torch.bool and torch.equal(mask, keep), (
            f"{what}: attention_mask {mask.long().tolist()} came, {keep.long().tolist()} was wanted"
        )
        positions = is_tensor(found.position_ids, f"{what}: position_ids")
        places = torch.cat([torch.arange(length) for length in lengths])
        assert positions.shape == keep.shape and torch.equal(positions[keep], places), (
            f"{what}: position_ids {positions.tolist()} came, where the mask is True 0, 1, 2, … were wanted"
        )
        embeds = is_tensor(found.inputs_embeds, f"{what}: inputs_embeds")
        assert embeds.isfinite().all(), f"{what}: inputs_embeds is not finite under padding"
        assert embeds.shape[:2] == keep.shape, f"{what}: inputs_embeds: shape {tuple(embeds.shape)} came"
        wanted = torch.cat(self.expected.embeds).detach().to(self.dtype)
        self.close(embeds.detach()[keep], wanted, f"{what}: inputs_embeds at the tokens")
        if self.step["labels"]:
            rows = [torch.tensor([entry.label - IGNORED for entry in row]) for row in self.expected.entries]
            right = padded(rows, max(lengths), side) + IGNORED
            labels = is_tensor(found.labels, f"{what}: labels")
            assert torch.equal(labels, right), f"{what}: labels {labels.tolist()} came, {right.tolist()} was wanted"
        else:
            assert found.labels is None, f"{what}: labels came where none were given"
        self.counted("merge")

    def reads(self) -> None:
        """forward, for its logits."""
        with self.inside():
            logits, loss = ran(self.built, Batch(self.given.ids, self.given.images, self.given.mask))
        assert loss is None, "forward: a loss came without labels"
        self.compare(logits)
        self.counted("forward")

    def compare(self, logits: Tensor) -> None:
        """The logits of each row."""
        for number, row in enumerate(self.expected.logits):
            came = logits.detach()[number, : len(row)]
            self.close(came, row.detach().to(self.dtype), f"forward: logits of row {number}")

    def learns(self) -> None:
        """forward with labels, and backward where gradients are on."""
        with self.inside():
            logits, loss = ran(self.built, self.given)
        loss = is_tensor(loss, "forward: loss")
        self.compare(logits)
        self.counted("forward")
        assert loss.dtype in (SINGLE, DOUBLE), f"forward: a loss in {loss.dtype} came"
        close = Close(max(self.close.tolerance, 1e-5))
        wanted = self.expected.loss
        close(loss.detach().double(), wanted.detach(), "forward: loss")
        reached = self.held.stage != 1 or any(entry.number >= 0 for row in self.expected.entries for entry in row)
        if not self.grads or not reached:
            return
        assert loss.requires_grad, "forward: the loss carries no gradient"
        loss.backward()
        if wanted.requires_grad:
            wanted.backward()
        if close.tolerance > 1e-3:
            return
        for name, parameter in self.built.parameters().items():
            if name.split(".")[0] not in TRAINED[self.held.stage]:
                continue
            right, came = self.expected.weights[name].grad, parameter.grad
            right = torch.zeros_like(self.expected.weights[name]) if right is None else right
            came = torch.zeros_like(parameter) if came is None else came
            assert came.dtype == parameter.dtype, f"forward, backward: the gradient of {name} is in {came.dtype}"
            size = max(1.0, abs(self.step["scale"]))
            limit = size * (1e-2 if self.low else 1e-5)
            close(came.double(), right, f"forward, backward: gradient of {name}", tolerance=limit)

    def generates(self) -> None:
        """generate, with an end token or without."""
        steps, given, place = self.step["generates"], self.given, self.step["eos"]
        wanted = continued(self.built, given, steps)
        eos = None if place is None else int(wanted[-1, min(place, steps - 1)])
        if eos is not None:
            wanted = ended(wanted, eos, self.built.pad)
        self.built.decoder.seen.clear()
        with self.inside():
            came = self.built.model.generate(given.ids, given.images, given.mask, steps, eos)
        what = f"generate(…, {steps}" + (")" if eos is None else f", {eos})")
        came = is_tensor(came, what)
        assert came.dtype == torch.int64, f"{what}: {came.dtype} came, torch.int64 was wanted"
        assert came.tolist() == wanted.tolist(), f"{what}: {came.tolist()} came, {wanted.tolist()} was wanted"
        assert self.step["mode"] == "inference" or not came.is_inference(), f"{what}: an inference tensor came"
        self.counted("generate")
        if self.step["counts"]:
            needed = [row.index(eos) + 1 if eos in row else steps for row in wanted.tolist()]
            calls, rows, columns = max(needed), len(wanted), max(self.expected.lengths)
            seen = [call.shape[:2] for call in self.built.decoder.seen]
            assert len(seen) <= calls, f"{what}: the decoder is called {len(seen)} times, {calls} are needed"
            fed = sum(one * length for one, length in seen)
            assert fed <= rows * (columns + calls - 1), f"{what}: the decoder reads rows and tokens {seen}"

    def counted(self, call: str) -> None:
        """The tower was called once, with all images, or not at all."""
        seen = [shape[0] for shape, _ in self.built.tower.seen]
        dtypes = {dtype for _, dtype in self.built.tower.seen}
        self.built.tower.seen.clear()
        count = 0 if self.given.images is None else len(self.given.images)
        if self.step["counts"]:
            assert seen == ([count] if count else []), f"{call}, {count} images: the tower is called with {seen}"
        if isinstance(self.built.tower, Tower) and seen:
            assert dtypes == {self.step["dtypes"][0]}, f"{call}: the tower is called with images in {dtypes}"

    def lets_go(self) -> None:
        """Nothing of a call is alive once its result is gone."""
        self.built.decoder.seen = None
        with Trace() as seen, torch.no_grad():
            self.built.model(self.given.ids, self.given.images, self.given.mask)
        left = seen.alive_after_collection()
        self.built.decoder.seen = []
        assert not left, f"forward: {left} bytes of what it made are alive after its result is gone"

    def left(self) -> None:
        """What the calls leave: modes, flags, gradients."""
        held, built = self.held, self.built
        told = f"in stage {held.stage}" if held.stage else "before any stage"
        modes = {"the model": (built.model, held.training), "the projector": (built.model.projector, held.training)}
        modes["the tower"] = built.tower, held.training and not held.stage
        if held.stage != 1:
            modes["the decoder"] = built.decoder, held.training
        for name, (module, training) in modes.items():
            assert module.training is training, f"{told}: {name}'s mode is training={module.training}"
        for name, parameter in built.parameters().items():
            trains = name.split(".")[0] in TRAINED[held.stage]
            assert parameter.requires_grad is trains, f"{told}: {name}.requires_grad is {parameter.requires_grad}"
            assert trains or parameter.grad is None, f"{told}: {name} has a gradient"
        if held.stage and isinstance(built.tower, Tower):
            count = int(value(built.tower.calls))
            assert count == 0, f"{told}: the tower's buffers are written to, {count} times"


test_calls_in_any_order = walk_check(Calls(), 12)
