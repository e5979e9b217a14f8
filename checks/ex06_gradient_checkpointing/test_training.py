"""Training (6.6, 6.7): train_step, a model that does not fit, and the plain model's gradients."""

import gc
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.testing import Close, Subject, Trace, calls, is_tensor, requirement

from .reference import (
    ALIKE,
    INPUTS,
    NOTHING_TWICE,
    B,
    Block,
    D,
    L,
    Map,
    Pair,
    Stack,
    V,
    left_on,
    recomputes,
    run_backward,
    same_gradient,
    seeded,
    tokens,
    wrap_layers,
)

# 6.6 a model that does not fit


@requirement("6.6")
def test_train_step_by_hand(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """One step of SGD with weight decay, in two groups of parameters: the loss before it, old gradients ignored, and
    w - lr·(g + d·w) afterwards.
    """
    for shape in ((B, L), (1, 2)):
        batch = {name: torch.randint(V, shape, generator=rng) for name in ("input_ids", "targets")}
        model, plain = seeded(lambda: Stack(1)), seeded(lambda: Stack(1))
        loss = functional.cross_entropy(plain(batch["input_ids"]).transpose(1, 2), batch["targets"])
        loss.backward()
        wanted = [(p - 0.5 * (p.grad + 0.25 * p)).detach() for p in plain.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)
        groups = [{"params": list(part.parameters())} for part in (model.embedding, model.layers, model.head)]
        optimizer = torch.optim.SGD(groups, lr=0.5, weight_decay=0.25)

        came = subject.train_step(model, batch, optimizer, nn.CrossEntropyLoss())

        assert type(came) in (float, int), f"train_step: a {type(came).__name__} came, a Python float was wanted"
        assert abs(came - loss.item()) < 1e-6, (
            f"train_step: the loss {came:.8g} came, {loss.item():.8g} was wanted\n"
            "wanted: what the criterion gives for all B·L positions, unscaled, before the step"
            + criterion_shapes(subject, batch)
        )
        hint = "zero_grad before backward, then step, once each"
        for (name, parameter), value in zip(model.named_parameters(), wanted, strict=True):
            what = f"train_step with SGD and weight decay: {name} afterwards"
            close(parameter.detach(), value, what, hint=hint)


@requirement("6.6")
def test_a_frozen_weight_keeps_no_old_gradient(subject: Subject, rng: torch.Generator) -> None:
    """The old gradient of a weight that is frozen now is cleared too, so that the optimizer leaves the weight alone."""
    batch = {name: tokens(rng) for name in ("input_ids", "targets")}
    model = seeded(lambda: Stack(1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    model.embedding.requires_grad_(False)

    subject.train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.5), nn.CrossEntropyLoss())

    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    wanted = [name for name in before if not name.startswith("embedding")]
    assert changed == wanted, (
        f"train_step on a model whose embedding is frozen, but has an old gradient: {changed} change, not {wanted}\n"
        "clear the old gradients of all that the optimizer holds: zero_grad asks not which of them need one now"
    )


def criterion_shapes(subject: Subject, batch: dict[str, Tensor]) -> str:
    """In words, what a step on `batch` gives the criterion."""
    got: list[Any] = []

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        got.append(f"logits {list(logits.shape)} and targets {list(targets.shape)}")
        return functional.cross_entropy(logits, targets)

    model = seeded(lambda: Stack(1))
    with suppress(Exception):
        subject.train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.5), criterion)
    b, length = batch["targets"].shape
    return f"; here it got {' and then '.join(got)} for B = {b}, L = {length}, V = {V}" if got else ""


@requirement("6.6")
def test_the_criterion_gets_its_positions_in_one_row(subject: Subject, rng: torch.Generator) -> None:
    """The criterion is called once, with logits [B·L, V] and targets [B·L] in the same order."""
    batch = {name: tokens(rng) for name in ("input_ids", "targets")}
    model = seeded(lambda: Stack(1))
    expected = model(batch["input_ids"]).detach()
    got: list[tuple[Tensor, Tensor]] = []

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        got.append((logits.detach().clone(), targets))
        return functional.cross_entropy(logits, targets)

    with calls(model) as entered:
        subject.train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.1), criterion)

    assert entered[model] == 1, f"train_step: the model is called {entered[model]} times, not once"
    assert len(got) == 1, f"train_step: the criterion is called {len(got)} times, not once"
    shapes = [tuple(tensor.shape) for tensor in got[0]]
    assert shapes == [(B * L, V), (B * L,)], (
        f"train_step: the criterion gets shapes {shapes}, not {[(B * L, V), (B * L,)]}"
    )
    assert torch.equal(got[0][1], batch["targets"].reshape(-1)), (
        "train_step: the criterion's targets are in another order"
    )
    assert (got[0][0] - expected.reshape(-1, V)).abs().max() < 1e-9, (
        "train_step: the criterion's logits are in another order"
    )


class Transposed(nn.Module):
    """Gives logits that are a view of others."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack(1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.stack(input_ids.T).transpose(0, 1)


@requirement("6.6")
def test_train_step_on_strided_tensors(subject: Subject, rng: torch.Generator) -> None:
    """input_ids and targets cut from one tensor of ids, as one predicts the next, and logits that are a view."""
    ids = torch.randint(V, (B, L + 1), generator=rng)
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    model, plain = seeded(Transposed), seeded(Transposed)
    wanted = functional.cross_entropy(plain(batch["input_ids"]).transpose(1, 2), batch["targets"]).item()
    what = "train_step on batch = ids[:, :-1], ids[:, 1:], with logits that are transposed"

    try:
        came = subject.train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.5), nn.CrossEntropyLoss())
    except RuntimeError as error:
        raise AssertionError(f"{what}: raises {error}\nview needs other strides; flatten and reshape do not") from error

    assert abs(came - wanted) < 1e-6, f"{what}: the loss {came} came, {wanted} was wanted"


@requirement("6.6")
def test_a_model_that_does_not_fit_trains(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Two steps under a budget of two thirds of what plain training needs, with the plain losses."""
    batch = {name: torch.randint(V, (2, 100), generator=rng) for name in ("input_ids", "targets")}
    plain, model = (seeded(lambda: Stack(5, hidden=80)) for _ in range(2))
    needed, wanted = plain_training(plain, batch)
    wrap_layers(subject, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    came, left = [], []
    gc.freeze()  # so that collecting what this check leaves in cycles takes no time
    try:
        with Trace() as seen:
            for _ in wanted:
                came.append(float(subject.train_step(model, batch, optimizer, nn.CrossEntropyLoss())))
                seen.alive_after_collection()  # a class made for a call takes a second collection to go
                left.append(seen.alive_after_collection())
    finally:
        gc.unfreeze()

    what = "two calls of train_step on a checkpointed model"
    close(
        torch.tensor(came), torch.tensor(wanted), f"{what}: losses", tolerance=1e-4, hint="plain training gives others"
    )
    assert left[1] < left[0] + 8 * 200 * D, (
        f"{what}: bytes alive after each step: {left}; what a step leaves must not pile up"
    )
    budget = needed * 2 // 3
    assert seen.peak_bytes <= budget, (
        f"{what}: {seen.peak_bytes} bytes are alive at once; there are {budget}, and plain training needs {needed}\n"
        + why_so_much(subject, batch)
    )


def why_so_much(subject: Subject, batch: dict[str, Tensor]) -> str:
    """What a peak that is too high points to."""
    with suppress(Exception):
        plain, model = (seeded(lambda: Stack(5, hidden=80)) for _ in range(2))
        wrap_layers(subject, model)
        alive: list[int] = []
        for one in (plain, model):
            with Trace() as seen:
                output = one(batch["input_ids"])
            alive.append(seen.alive_bytes)
            del output
        if alive[1] >= 0.9 * alive[0]:
            return (
                f"forward still keeps what it computed inside: it leaves {alive[1]} bytes, {alive[0]} without wrapping"
            )
        modes: list[bool] = []
        model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
        subject.train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.5), nn.CrossEntropyLoss())
        if modes == [False]:
            return "train_step calls the model in eval, where nothing is recomputed"
    return "recompute one layer at a time, and let go of it before the next"


def plain_training(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, list[float]]:
    """The most bytes alive at once in a step of plain training, and the losses of two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses: list[float] = []
    peak = 0
    for step in range(2):
        with Trace() if step == 0 else nullcontext() as seen:
            loss = functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten())
            loss.backward()
        peak = peak if seen is None else seen.peak_bytes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return peak, losses


# 6.7 gradients


@requirement("6.7")
def test_parameters_get_the_plain_gradients(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """After backward every parameter has the plain model's gradient, with dropout under a seed too."""
    input_ids = tokens(rng)
    pair = Pair(subject, lambda: Stack(3, 0.5), 2)

    pair.step(lambda model: model(input_ids).square().sum().backward())

    def without_dropout() -> str:
        twins = Pair(subject, lambda: Stack(3), 2)
        try:
            twins.step(lambda model: model(input_ids).square().sum().backward())
            twins.agree(close, "")
        except Exception:
            return "it differs without dropout too"
        return (
            "the second computation must drop what the first dropped: start from the random state there was before "
            "the first computation drew anything"
        )

    pair.agree(close, "backward of a model with wrapped layers, dropout 0.5", without_dropout)


@requirement("6.7")
def test_the_random_stream_goes_on_as_after_a_plain_step(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Recomputing moves the random stream neither on nor back, with draws between forward and backward."""
    input_ids = tokens(rng)
    pair = Pair(subject, lambda: Stack(2, 0.5))

    def step(model: Any) -> None:
        loss = model(input_ids).square().sum()
        torch.rand(3)
        loss.backward()

    pair.step(step)

    assert torch.equal(pair.streams[1], pair.streams[0]), (
        "training step, 3 draws before backward: the random stream is not where a plain step ends\n"
        "put back after the second computation what the random state was before it"
    )
    pair.agree(close, "backward of a model with dropout", "drawing between forward and backward changes nothing")


@requirement("6.7")
def test_later_steps_are_as_good_as_the_first(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Later steps, with other weights and other data, have the plain gradients; without zero_grad they add up. A layer
    that was called may get new parameters, as load_state_dict(assign=True) gives it.
    """
    batches = [tokens(rng) for _ in range(3)]
    pair = Pair(subject, lambda: Stack(1, 0.5))

    def steps(model: Any) -> None:
        for number, input_ids in enumerate(batches):
            if number == 1:
                model.zero_grad()
                for part in list(model.modules()):
                    for name, parameter in list(part.named_parameters(recurse=False)):
                        setattr(part, name, nn.Parameter(parameter.detach().clone()))
            model(input_ids).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.01 * parameter.grad if parameter.grad is not None else 0.0)

    pair.step(steps)

    hint = "weights and input change from step to step: each step computes with its own, the second time too"
    pair.agree(close, "backward of later steps", hint)


@requirement("6.7")
def test_a_second_backward_with_retain_graph(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """backward(retain_graph=True) and a second backward give twice the gradient, and leave the random stream alone."""
    input_ids = tokens(rng)
    pair = Pair(subject, lambda: Stack(1, 0.5))

    def step(model: Any) -> None:
        loss = model(input_ids).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    pair.step(step)

    pair.agree(close, "second backward with retain_graph", "what forward kept must serve a second backward")
    assert torch.equal(pair.streams[1], pair.streams[0]), "second backward with retain_graph: the random stream moved"


@requirement("6.7")
def test_several_calls_before_backward(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Each backward belongs to its own call, with its own inputs and its own dropout."""
    both = tokens(rng), tokens(rng)
    pair = Pair(subject, lambda: Stack(1, 0.5))

    def step(model: Any) -> None:
        losses = [model(input_ids).square().sum() * scale for input_ids, scale in zip(both, (1, 3), strict=True)]
        for loss in losses:
            loss.backward()

    pair.step(step)

    pair.agree(close, "two calls, then two backwards", "what a call keeps belongs to the call, not to the module")


@requirement("6.7")
def test_shared_parameters(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A weight that belongs to several modules gets the sum of its gradients."""
    input_ids = tokens(rng)

    def build() -> Any:
        model: Any = Stack(3)
        model.layers[2].up.weight = model.layers[0].up.weight
        model.head.weight = model.embedding.weight
        return model

    pair = Pair(subject, build)

    pair.step(lambda model: model(input_ids).square().sum().backward())

    pair.agree(close, "backward with a weight shared between layers, and one between the embedding and the head")


@requirement("6.7")
def test_frozen_parameters_stay_without_gradient(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Frozen parameters get no gradient, the others theirs, also behind a layer that is frozen as a whole; those that
    are thawed later get theirs too.
    """
    input_ids = tokens(rng)

    def build() -> Any:
        model: Any = Stack(3)
        model.layers[0].up.weight.requires_grad_(False)
        model.layers[1].requires_grad_(False)
        return model

    pair = Pair(subject, build)

    pair.step(lambda model: model(input_ids).square().sum().backward())

    pair.agree(close, "backward of a model with frozen parameters")
    for model in (pair.plain, pair.wrapped):
        model.requires_grad_().zero_grad()
    pair.step(lambda model: model(input_ids).square().sum().backward())
    pair.agree(close, "backward of a model whose parameters were frozen when it was wrapped")
    assert pair.entered == [2, 2, 2], (
        f"step of a model whose parameters were frozen in its first step: layers are entered {pair.entered} times, "
        "not twice each"
    )


@requirement("6.7")
def test_a_frozen_module_asks_for_no_gradient(subject: Subject, rng: torch.Generator) -> None:
    """What is made of inputs without gradient by a module that is frozen as a whole needs none, as ever."""
    x = torch.randn(2, D, generator=rng, dtype=torch.float64)
    frozen, block = seeded(Block).requires_grad_(False), seeded(Block)

    wrappers = [subject.CheckpointWrapper(one) for one in (frozen, block)]
    asks = [is_tensor(wrapper(x), "forward of a wrapped module").requires_grad for wrapper in wrappers]
    thawed = [wrapper.requires_grad_(number == 0)(x).requires_grad for number, wrapper in enumerate(wrappers)]

    assert asks == [False, True], (
        f"forward of a wrapped module on an input without gradient: requires_grad of the output is {asks[0]} if all of "
        f"its parameters are frozen, and {asks[1]} if none is; False and True were wanted\n"
        "an anchor that asks for a gradient is for modules with a parameter that does"
    )
    assert thawed == [True, False], (
        f"forward of a wrapped module on an input without gradient: requires_grad of the output is {thawed[0]} if its "
        f"parameters are thawed after a first call, and {thawed[1]} if they are frozen then; True and False were wanted"
    )
    recomputes(subject, x)


@requirement("6.7")
def test_steps_after_other_calls(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A step is as good after a call without gradients, and after a call that failed."""
    input_ids = tokens(rng)

    for earlier in ("inference_mode", "a wrong shape"):
        pair = Pair(subject, lambda: Stack(1, 0.5))
        if earlier == "inference_mode":
            with torch.inference_mode():
                pair.wrapped(input_ids)
        else:
            with suppress(RuntimeError):
                pair.wrapped.layers[0](torch.ones(2, D + 1, dtype=torch.float64))
            assert not (left := left_on()), (
                f"a call of a wrapped layer with a wrong shape: {left} is still on afterwards"
            )

        pair.step(lambda model: model(input_ids).square().sum().backward())

        pair.agree(close, f"backward after a call with {earlier}")


@requirement("6.7")
def test_a_wrapped_model_may_be_cast(subject: Subject, rng: torch.Generator) -> None:
    """After .float() a wrapped model trains in float32."""
    input_ids = tokens(rng)
    pair = Pair(subject, lambda: Stack(1, 0.5))

    pair.step(lambda model: model(input_ids).square().sum().backward())
    for model in (pair.plain, pair.wrapped):
        model.float().zero_grad()
    pair.step(lambda model: model(input_ids).square().sum().backward())

    what = "backward after .float()"
    pair.agree(Close(1e-4), what, "the model was cast between the steps")


class Careful(nn.Module):
    """Works in float32 under autocast too, with an additive mask."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Map(D, D)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.softmax(self.up(x) + bias, -1) ** 2


@requirement("6.7")
def test_nothing_is_kept_or_computed_below_its_own_dtype(subject: Subject, rng: torch.Generator) -> None:
    """A layer that switches autocast off has float32 gradients, with a mask of which a row is -1e9, and no number is
    above 0.
    """
    x, slopes = torch.randn(2, B, D, generator=rng).unbind()
    bias = -slopes.abs()
    bias[0] = -1e9
    plain, module = seeded(Careful, torch.float32), seeded(Careful, torch.float32)
    leaves = [x.clone().requires_grad_() for _ in range(2)]

    with calls(module.up) as entered:
        for one, leaf in zip((plain, subject.CheckpointWrapper(module)), leaves, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                output = is_tensor(one(leaf, bias), "forward of a wrapped module")
            run_backward(output.sin().sum())

    what = "forward under autocast of a layer that switches it off, with a mask, backward outside: gradient of"
    hint = "keep inputs as they are, and run no backward under the autocast state of forward"
    came, wanted = ((leaf.grad, one.up.weight.grad) for leaf, one in zip(leaves[::-1], (module, plain), strict=True))
    for name, one, other in zip(("x", "a weight"), came, wanted, strict=True):
        same_gradient(Close(1e-6), one, other, f"{what} {name}", hint, missing=INPUTS if name == "x" else ALIKE)
    assert entered[module.up] > 1, f"training step: {NOTHING_TWICE}"


@requirement("6.7")
def test_gradients_reach_what_comes_before(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The input of a wrapped layer passes its gradient on, and autograd goes on to the input's own history."""
    x, leaf = (torch.randn(B, D, generator=rng, dtype=torch.float64) for _ in range(2))
    leaf.copy_(x)
    plain, block = seeded(Block), seeded(Block)
    wrapper = subject.CheckpointWrapper(block)

    with calls(block.up) as entered:
        for module, start in ((plain, x.requires_grad_()), (wrapper, leaf.requires_grad_())):
            run_backward(module(torch.sin(start) * 2).square().sum())

    same_gradient(close, leaf.grad, x.grad, "backward through a wrapper: gradient of x, of which its input was made")
    assert entered[block.up] > 1, f"training step: {NOTHING_TWICE}"
