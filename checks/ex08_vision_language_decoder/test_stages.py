"""Two stages of training (8.6): what trains, what stays, and modes."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import nn

from harness.testing import Close, Subject, is_tensor, refuses, requirement

from .reference import PLACEHOLDER, Batch, Built, batch, build, expect, ran, value

P = PLACEHOLDER
TRAINED = {0: ("vision", "projector", "decoder"), 1: ("projector",), 2: ("projector", "decoder")}


@pytest.fixture
def close() -> Close:
    """The loss may be computed in float32."""
    return Close(1e-5)


def told(stages: Sequence[int]) -> str:
    """The calls so far in words."""
    return "after " + ", ".join(f"set_stage({stage})" for stage in stages) if stages else "before any stage"


def lesson(rng: torch.Generator) -> Batch:
    """A batch with images and labels in which every parameter gets a gradient."""
    return batch(rng, [[9, P, 5, 6], [0, 1, P, 4]], [[1, 1, 1, 1], [0, 1, 1, 1]], [[9, 0, 5, 6], [0, 1, 0, 4]])


def enter(built: Built, stage: int) -> None:
    """Goes into a stage, from one whose last step has left gradients."""
    for parameter in built.parameters().values():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    built.model.set_stage(stage)


@requirement("8.6")
@pytest.mark.parametrize("stages", [(1, 1, 2, 1), (2, 1, 2, 2)], ids=["from_1", "from_2"])
def test_what_a_stage_trains(subject: Subject, rng: torch.Generator, stages: tuple[int, ...]) -> None:
    """What the last stage does not train has requires_grad False and no gradient; the rest asks for gradients."""
    built = build(subject, rng)
    for name, parameter in built.parameters().items():
        assert parameter.requires_grad, f"{told(())}: {name} does not ask for gradients; everything trains"
    for parameter in (built.tower.shift, built.decoder.embed.weight):
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(False)  # By hand, before any stage.

    for place in range(len(stages)):
        enter(built, stages[place])

        for name, parameter in built.parameters().items():
            trains = name.split(".")[0] in TRAINED[stages[place]]
            what = f"set_stage: {name} {told(stages[: place + 1])}"
            assert parameter.requires_grad == trains, f"{what}: requires_grad {parameter.requires_grad} came"
            assert trains or parameter.grad is None, (
                f"{what}: an old gradient is still there, None was wanted: an optimizer would follow it"
            )


@requirement("8.6")
def test_a_step_changes_the_right_bytes(subject: Subject, rng: torch.Generator) -> None:
    """A step of AdamW over all parameters, in training, changes all that the stage trains, and nothing else."""
    built, given, stages = build(subject, rng), lesson(rng), (0, 1, 2)
    optimizer = torch.optim.AdamW(built.model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for place, stage in enumerate(stages):
        if stage:
            enter(built, stage)
        built.model.train()
        before = {name: value(parameter) for name, parameter in built.parameters().items()}
        buffers = {name: value(buffer) for name, buffer in built.tower.named_buffers()}
        so_far = told(stages[1 : place + 1])

        loss = is_tensor(ran(built, given)[1], "forward: loss")
        assert loss.requires_grad, f"forward {so_far}: the loss carries no gradient"
        loss.backward()
        optimizer.step()

        for name, parameter in built.parameters().items():
            same, trains = torch.equal(parameter, before[name]), name.split(".")[0] in TRAINED[stage]
            assert same != trains, (
                f"a step of AdamW {so_far}: {name} has {'not ' if same else ''}changed; "
                f"{' and '.join(TRAINED[stage])} train{'s' if stage == 1 else ''}"
            )
        for name, buffer in built.tower.named_buffers():
            assert not stage or torch.equal(buffer, buffers[name]), (
                f"forward {so_far}, after train(): the tower's buffer {name} has changed; it stays in eval"
            )


@requirement("8.6")
def test_what_trains_gets_its_full_gradient(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In stage 1 the projector's gradient goes through the whole decoder, in stage 2 both have theirs."""
    built, given = build(subject, rng), lesson(rng)
    given.labels = None
    expected = expect(built, given, gradients=True)
    probes = [torch.randn(row.shape, generator=rng, dtype=torch.float64) for row in expected.logits]
    torch.stack([(row * probe).sum() for row, probe in zip(expected.logits, probes, strict=True)]).sum().backward()
    for stages in ((1,), (1, 2)):
        built.model.set_stage(stages[-1])
        built.model.zero_grad()

        logits, _ = ran(built, given)
        so_far = f"forward {told(stages)}"
        assert logits.requires_grad, f"{so_far}: the logits carry no gradient; does the decoder run in no_grad?"
        sums = [(row[: len(probe)] * probe).sum() for row, probe in zip(logits, probes, strict=True)]
        torch.stack(sums).sum().backward()

        for name, parameter in built.parameters().items():
            if name.split(".")[0] in TRAINED[stages[-1]]:
                wanted = is_tensor(expected.weights[name].grad, "")
                close(parameter.grad, wanted, f"{so_far}, backward: gradient of {name}")


@requirement("8.6")
def test_the_tower_stays_in_eval(subject: Subject, rng: torch.Generator) -> None:
    """Once a stage is set the tower is in eval, also after train(), of a parent too; before it follows as usual."""
    for stages, training in (((1, 2), True), ((2, 1), False)):
        built = build(subject, rng)
        model, tower = built.model, built.tower
        tower.inner = nn.Sequential(nn.Dropout())
        parent = nn.ModuleList([model])
        model.eval()
        model.train()
        assert tower.training and tower.inner[0].training, "train() before any stage: the tower is in eval"
        model.train(training)

        for stage in stages:
            model.set_stage(stage)
            for call in ("", "train()", "eval()", "train(True)", "train() of a parent"):
                if call == "train() of a parent":
                    parent.train()
                elif call == "train(True)":
                    came = model.train(True)
                    assert came is model, "train(True): a module's train() returns the module"
                elif call:
                    getattr(model, call[:-2])()
                what = f"set_stage({stage}){', then ' + call if call else ''}"
                awake = tower.training or tower.inner[0].training
                assert not awake, f"{what}: the tower, or a part of it, is in training"


@requirement("8.6")
def test_no_other_mode_changes(subject: Subject, rng: torch.Generator) -> None:
    """set_stage leaves the modes of the model, the projector and a decoder that trains; train() and eval() set them."""
    for stage, training in ((1, True), (2, False)):
        built = build(subject, rng)
        built.model.train(training)
        parts = {"the model": built.model, "the projector": built.model.projector}
        if stage == 2:
            parts |= {"the decoder": built.decoder, "a layer of the decoder": built.decoder.layers[0]}
        built.model.projector.train(not training)
        modes = {name: part.training for name, part in parts.items()}
        built.model.set_stage(stage)
        for name, part in parts.items():
            assert part.training is modes[name], f"set_stage({stage}): {name}'s mode has changed"
        for mode in (True, False, True):
            built.model.train(mode)
            for name, part in parts.items():
                assert part.training is mode, f"train({mode}) after set_stage({stage}): {name} does not follow"


@requirement("8.6")
def test_other_stages_are_refused(subject: Subject, rng: torch.Generator) -> None:
    """A stage other than 1 or 2 is a ValueError, and leaves all as it was."""
    built = build(subject, rng)
    for stage in (0, 3, -1):
        refuses(ValueError, partial(built.model.set_stage, stage), f"set_stage({stage})")

        frozen = [name for name, parameter in built.parameters().items() if not parameter.requires_grad]
        assert not frozen, f"set_stage({stage}): refused, but {frozen[0]} is frozen now"
        assert built.model.train().vision.training, f"set_stage({stage}): refused, but the tower stays in eval"


@requirement("8.6")
def test_a_stage_is_the_models_own(subject: Subject, rng: torch.Generator) -> None:
    """Another model still trains everything."""
    built = build(subject, rng)
    build(subject, rng).model.set_stage(1)

    frozen = [name for name, parameter in built.parameters().items() if not parameter.requires_grad]
    assert not frozen, f"set_stage(1) of another model: {frozen[0]} is frozen here"
    assert built.model.train().vision.training, "set_stage(1) of another model: this one's tower stays in eval"
