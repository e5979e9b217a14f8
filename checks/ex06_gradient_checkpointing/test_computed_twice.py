"""Computed twice (6.2, 6.3): what stays alive and what is entered twice, and under which autocast state."""

import gc
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, Trace, calls, is_tensor, requirement, seed

from .reference import (
    NO_GRADIENT,
    NOTHING_TWICE,
    STATES,
    B,
    Block,
    D,
    Pair,
    Precision,
    Row,
    Stack,
    Unit,
    autocast,
    nothing_twice,
    precision_step,
    recomputes,
    run_backward,
    same_gradient,
    seeded,
    tokens,
    ups,
    wrap_layers,
)

# 6.2 memory against computation


@requirement("6.2")
def test_chosen_layers_are_entered_exactly_twice(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A training step enters each chosen layer twice, every other module once."""
    input_ids = tokens(rng)
    expected = seeded(lambda: Stack(4))(input_ids)
    for n, wanted in ((1, [2, 2, 2, 2]), (3, [2, 1, 1, 2])):
        model = seeded(lambda: Stack(4))
        layers = ups(model)
        wrap_layers(subject, model, n)

        with calls(*layers, model.embedding, model.head) as entered:
            output = model(input_ids)
            output.square().sum().backward()

        close(output, expected, "forward of a wrapped model", tolerance=1e-2)
        counts = [entered[up] for up in layers]
        assert counts == wanted, (
            f"training step, n = {n}: the layers are entered {counts} times; {wanted} were wanted"
            + (f"\n{NO_GRADIENT}" if max(counts) == 1 and nothing_twice(subject) == NO_GRADIENT else "")
        )
        around = [entered[model.embedding], entered[model.head]]
        assert around == [1, 1], (
            f"training step, n = {n}: embedding and head are entered {around} times; recompute chosen layers only"
        )


def alive_after_forward(model: nn.Module, x: Tensor, *shared: Tensor) -> tuple[int, Tensor]:
    """Bytes that only the output keeps alive after forward, without what is smaller than the input: random states."""
    with Trace(at_least=x.numel()) as seen:
        output = model(x, *shared)
    return seen.alive_bytes, output


class Biased(Unit):
    """A layer that is given two more inputs, and keeps neither for backward."""

    def forward(self, x: Tensor, bias: Tensor, *, more: Tensor) -> Tensor:  # type: ignore[override]
        return torch.sin(self.up(x) + bias + more)


class Sharing(Row):
    """Layers that are all given the same two tensors."""

    def forward(self, x: Tensor, bias: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = layer(x, bias, more=more)
        return x


@requirement("6.2")
def test_less_is_alive_the_more_layers_are_chosen(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """From none over every 3rd and every 2nd to every layer, what is alive after forward falls, also where all layers
    are given the same tensors, with and without gradient.
    """
    x, bias, more = torch.randn(3, 200, D, generator=rng, dtype=torch.float64).unbind()
    inputs = x.requires_grad_(), bias.requires_grad_(), more
    alive: dict[int, int] = {}
    expected: Tensor | None = None
    for n in (0, 3, 2, 1):
        model = seeded(lambda: Sharing(*(Biased() for _ in range(6))))
        expected = model(*inputs) if expected is None else expected
        wrap_layers(subject, model, n)
        alive[n], output = alive_after_forward(model, *inputs)
        close(output, expected, f"forward of 6 layers, n = {n}", tolerance=1e-2)

    assert alive[0] > alive[3] > alive[2] > alive[1], (
        f"forward of 6 layers, bytes alive afterwards by n (0: none): {alive}\n"
        "the more layers are chosen, the less is alive; what all of them are given is kept once"
        + ("; here forward still keeps what it computes inside" if alive[1] == alive[0] else "")
    )


@requirement("6.2")
def test_every_encoder_layer_leaves_less_than_a_quarter(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With every one of 8 encoder layers chosen, less than 0.25 of what none leaves is alive after forward: 8 times
    what one leaves.
    """

    def build() -> Any:
        return Row(*(nn.TransformerEncoderLayer(20, 2, 50, dropout=0.0, batch_first=True) for _ in range(8)))

    x = torch.randn(3, 23, 20, generator=rng, dtype=torch.float64).requires_grad_()
    model = seeded(build)
    one, _ = alive_after_forward(model.layers[0], x)
    none, expected = 8 * one, model(x)
    wrap_layers(subject, model)

    every, output = alive_after_forward(model, x)

    close(output, expected, "forward of 8 encoder layers", tolerance=1e-2)
    assert output.requires_grad, "forward of 8 encoder layers: the output carries no gradient"
    assert every < 0.25 * none, (
        f"forward of 8 encoder layers: {every} bytes stay alive, {every / none:.2f} of what plain layers leave; "
        "less than 0.25 is asked for\nsomething holds the activations: a closure, a context, a list"
    )


@requirement("6.2")
def test_nothing_outlives_the_output(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Once the output is let go, nothing of a call is alive any more: in training, in eval, and without gradients."""
    x = torch.randn(400, D, generator=rng, dtype=torch.float64)
    expected = seeded(Block)(x).detach()
    alive: dict[str, int] = {}
    gc.freeze()  # so that collecting takes no time
    try:
        for case in ("a step", "a forward", "eval", "no_grad"):
            wrapper = subject.CheckpointWrapper(seeded(Block)).train(case != "eval")
            leaf = x.clone().requires_grad_()
            with Trace(at_least=x.numel()) as seen:
                with torch.no_grad() if case == "no_grad" else nullcontext():
                    # What came in is of this call, too: nothing else holds it.
                    output = wrapper(leaf * 1)
                if case == "a step":
                    run_backward(output.sum())
                leaf.grad = None
            close(output.detach(), expected, f"forward of a wrapper, {case}", tolerance=1e-2)
            del output
            seen.alive_after_collection()  # a class made for a call takes a second collection to go
            alive[case] = seen.alive_after_collection()
            del wrapper
    finally:
        gc.unfreeze()

    assert not any(alive.values()), (
        f"a wrapper that is called: bytes still alive when its output is gone: {alive}\n"
        "what a call keeps belongs to its output's graph; no attribute, list or global keeps it"
    )
    recomputes(subject, x)


EVAL, PARTLY = "wrapped in training, then eval()", "module in eval but for a part when it is wrapped"


def why_twice(subject: Subject, case: str, wrapper: Any) -> str:
    """What a module that is entered more than once points to."""
    if case == PARTLY:
        return (
            "the wrapper decides by its own training flag, which it takes over from its module when it is made; "
            f"here its flag is {wrapper.training}, and its module's was False"
        )
    if case != EVAL:
        return "decide at each call: checkpoint only in training, with gradients enabled, and if use_checkpoint says so"
    with suppress(Exception):
        block = seeded(Block).eval()
        with calls(block.up) as entered:
            subject.CheckpointWrapper(block)(torch.ones(2, D, dtype=torch.float64)).sum().backward()
        if entered[block.up] == 1:
            return "wrapped in eval it is entered once: decide at each call, not when the wrapper is made"
    return "decide at each call, by the wrapper's training flag"


@requirement("6.2")
def test_nothing_is_computed_twice_without_need(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Where nothing is to be recomputed, a wrapped block gives the plain output and is entered once."""
    x = torch.randn(2, D, generator=rng, dtype=torch.float64).requires_grad_()
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    for case in (EVAL, "no_grad", "inference_mode", "use_checkpoint=False", PARTLY):
        plain, block = (seeded(lambda: Block(p=0.5)) for _ in range(2))
        plain.train(case not in (EVAL, PARTLY))
        block.train(case != PARTLY)
        block.up.train()
        wrapper = subject.CheckpointWrapper(block, use_checkpoint=case != "use_checkpoint=False")
        if case == EVAL:
            wrapper.train().eval()

        with modes.get(case, nullcontext)(), calls(block.up) as entered:
            seed(3)
            output = is_tensor(wrapper(x), f"forward of a wrapper, {case}")
            if output.requires_grad:
                output.sum().backward()

        seed(3)
        with modes.get(case, nullcontext)():
            close(output, plain(x), f"forward of a wrapper, {case}")
        assert output.requires_grad == (case not in modes), (
            f"forward of a wrapper, {case}: requires_grad is {output.requires_grad}, not {case not in modes}"
        )
        assert entered[block.up] == 1, (
            f"forward and backward of a wrapper, {case}: its module is entered {entered[block.up]} times; once was "
            f"wanted\n{why_twice(subject, case, wrapper)}"
        )
    recomputes(subject, x)


@requirement("6.2")
def test_the_mode_may_change_after_wrapping(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """train() and eval() on a wrapped model reach the wrapped layers, also their dropout."""
    input_ids = tokens(rng)
    model, plain = seeded(lambda: Stack(2, p=0.5)), seeded(lambda: Stack(2, p=0.5)).eval()
    layers = ups(model)
    wrap_layers(subject, model.eval())

    for training, times in ((False, 1), (True, 2), (False, 1)):
        with calls(*layers) as entered:
            output = model.train(training)(input_ids)
            output.sum().backward()

        mode = "train" if training else "eval"
        counts = [entered[up] for up in layers]
        assert counts == [times] * 2, (
            f"step of a model wrapped in eval, now in {mode}: layers are entered {counts} times; {[times] * 2} were "
            "wanted\ndecide at each call, by the flag that train() and eval() set"
        )
        if not training:
            close(
                output,
                plain(input_ids),
                "forward of a wrapped model in eval",
                hint="eval() must reach the wrapped layer's dropout",
            )


@requirement("6.2")
def test_a_layer_in_eval_stays_in_eval(subject: Subject, rng: torch.Generator) -> None:
    """A wrapper takes over its module's training flag, one by one."""
    model = seeded(lambda: Stack(3))
    layers = ups(model)
    model.layers[1].eval()

    wrap_layers(subject, model)
    with calls(*layers) as entered:
        model(tokens(rng)).sum().backward()

    flags = [layer.training for layer in model.layers]
    assert flags == [True, False, True], (
        f"layer 1 was in eval when it was wrapped; training flags are {flags} afterwards, not [True, False, True]"
    )
    counts = [entered[up] for up in layers]
    assert counts == [2, 1, 2], (
        f"layer 1 was in eval when it was wrapped: layers are entered {counts} times, not [2, 1, 2]"
    )


@requirement("6.2")
def test_checkpoint_itself_recomputes(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """checkpoint(module, x) gives the output and x's gradient, keeps next to nothing, and enters the module twice."""
    x, leaf = (torch.randn(1000, D, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(2))
    leaf.data.copy_(x.data)
    block, plain = seeded(lambda: Block(hidden=40)), seeded(lambda: Block(hidden=40))
    plain(leaf).square().sum().backward()

    with calls(block.up) as entered, Trace(at_least=x.numel()) as seen:
        output = is_tensor(subject.checkpoint(block, x), "checkpoint(module, x)")
        kept = seen.alive_bytes
        run_backward(output.square().sum(), "checkpoint(module, x)")

    same_gradient(close, x.grad, leaf.grad, "checkpoint(module, x): gradient of x", tolerance=1e-2)
    assert kept < 8 * 1000 * 40, (
        f"checkpoint(module, x): {kept} bytes stay alive after forward, less than {8 * 1000 * 40} was wanted"
    )
    assert entered[block.up] == 2, (
        f"checkpoint(module, x): the module is entered {entered[block.up]} times in a step, not twice"
    )


# 6.3 mixed precision


@requirement("6.3")
def test_the_second_computation_has_the_autocast_state_of_the_first(
    subject: Subject, close: Close, rng: torch.Generator
) -> None:
    """Whatever the state of backward, the module multiplies in the same dtype both times, each call in its own."""
    for backward in STATES:
        each_in_its_own_state(subject, close, rng, backward)


def each_in_its_own_state(subject: Subject, close: Close, rng: torch.Generator, backward: str) -> None:
    """A module is called under each state, and then all backwards run under one."""
    module, plain = seeded(Precision, torch.float32), seeded(Precision, torch.float32)
    wrapper = subject.CheckpointWrapper(module)
    leaves = {state: torch.randn(B, D, generator=rng).requires_grad_() for state in STATES}
    outputs = {}
    for state, x in leaves.items():
        with autocast(state):
            outputs[state] = is_tensor(wrapper(x), f"forward of a wrapper under autocast {state}")

    for forward, x in leaves.items():
        what = f"forward under autocast {forward}, backward under {backward}"
        wanted = STATES[forward] or torch.float32
        module.seen.clear()
        error = backward_under(backward, outputs.pop(forward), what)
        if error is not None and not module.seen:
            raise error
        assert module.seen, f"{what}: {NOTHING_TWICE}"
        hint = "the second forward is under the first's state, off included: what torch.is_autocast_enabled and "
        assert set(module.seen) == {wanted}, (
            f"{what}: the module multiplies in {module.seen} the second time; {wanted} was wanted\n"
            f"{hint}get_autocast_dtype say in the first"
        )
        if error is not None:
            raise error
        leaf = x.detach().requires_grad_()
        precision_step(plain, leaf, forward, backward)
        # Eight bits of bfloat16: the order of a backward product's roundings is free.
        same_gradient(close, x.grad, leaf.grad, f"{what}: gradient of the input", tolerance=3e-2)


def backward_under(state: str, output: Tensor, what: str) -> RuntimeError | None:
    """Runs backward in an autocast state, which has to be the same afterwards; the error with which it ends, if any."""
    assert output.requires_grad, f"{what}: {NO_GRADIENT}"
    error: RuntimeError | None = None
    with autocast(state):
        try:
            output.float().square().sum().backward()
        except RuntimeError as raised:  # a wrong dtype often ends so
            error = raised
        left = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    wanted = STATES[state] is not None, STATES[state] or torch.bfloat16
    assert left == wanted, f"{what}: autocast (on, dtype) is {left} after backward, {wanted} before"
    return error


@requirement("6.3")
def test_a_whole_step_under_autocast(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A step whose backward is inside the same autocast region gives what comes before the layers its gradient."""
    input_ids = tokens(rng)
    for dtype in ("float16", "bfloat16"):
        pair = Pair(subject, lambda: Stack(1), dtype=torch.float32)

        def step(model: Any, state: str = dtype) -> None:
            with autocast(state):
                model(input_ids).float().square().mean().backward()

        pair.step(step)

        came, wanted = pair.wrapped.embedding.weight.grad, pair.plain.embedding.weight.grad
        close(came, wanted, f"step under autocast {dtype}: gradient of the embedding", tolerance=3e-2)
