"""The sharded optimizer: its memory, what it sends, and its values (10.7, 10.8)."""

from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from harness.testing import Close, Subject, Trace, forbid, halfway, requirement

from .meeting import Call
from .ranks import note, run
from .reference import (
    Make,
    Script,
    agree,
    alone,
    copies,
    give,
    on_ranks,
    parameters,
    same_everywhere,
    state_bytes,
    wrappers,
)

LR: dict[str, Any] = {"lr": 0.1}
MOMENTUM: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}

# 10.7 memory and what is sent


class Sizes:
    """A case of 10.7: groups of parameters by their numbers; frozen ones are negative, later groups are added."""

    def __init__(
        self,
        *groups: tuple[int, ...],
        later: tuple[tuple[int, ...], ...] = (),
        ranks: int = 2,
        saves: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.groups, self.later, self.ranks, self.saves, self.dtype = groups, later, ranks, saves, dtype

    def made(self) -> list[list[nn.Parameter]]:
        """The parameters by group; those of an even number are not contiguous."""
        return [[self._parameter(n) for n in group] for group in (*self.groups, *self.later)]

    def _parameter(self, n: int) -> nn.Parameter:
        rows = 1 if n % 2 else 2
        return nn.Parameter(torch.full((rows, abs(n) // rows), 0.5, dtype=self.dtype).mT, requires_grad=n > 0)


CASES = {
    "alternating sizes": Sizes((40, 2, 40, 2, 40, 2), saves=True),
    "large ones first": Sizes((60, 50, 40, 1, 2, 3)),
    "small ones first": Sizes((5, 5, 5, 60, 50, 40)),
    "one per group": Sizes((30,), (31,), (32,), (33,), dtype=torch.bfloat16),
    "large frozen ones": Sizes((-400, 30, 30, 30, 30, 30)),
    "groups added later": Sizes((30,), later=((31,), (32,), (-90, 33))),
    "three ranks": Sizes((30, 31, 32, 33, 34), ranks=3, saves=True),
    "a single rank": Sizes((30, 31), ranks=1),
}


MARKS = {"three ranks": halfway}


@requirement("10.7")
@pytest.mark.parametrize(
    "case", [pytest.param(name, id=name.replace(" ", "-"), marks=MARKS.get(name, ())) for name in CASES]
)
def test_each_rank_keeps_a_share(subject: Subject, close: Close, case: str) -> None:
    """On every rank at most its part of the state and one parameter's is alive; a step sends little more than the
    parameters.
    """
    sizes = CASES[case]
    kind, everywhere = subject.ShardedOptimizer, [sizes.made() for _ in range(sizes.ranks)]
    defaults = {**LR, "amsgrad": sizes.saves}

    def job(rank: int) -> dict[str, int]:
        groups = everywhere[rank]
        every = [parameter for group in groups for parameter in group]
        give(every, 0)
        alive = {}
        with Trace() as seen:
            first = [{"params": group} for group in groups[: len(sizes.groups)]]
            optimizer = kind(first, torch.optim.AdamW, **defaults)
            for group in groups[len(sizes.groups) :]:
                optimizer.step()
                optimizer.add_param_group({"params": group})
            note("step")
            optimizer.step()
            note("end")
        alive["a step"] = seen.alive_bytes
        with suppress(Exception), seen if sizes.saves else nullcontext():
            # They come with the next step of the exercise, which judges them.
            saved = optimizer.state_dict() if sizes.saves else None
            alive["state_dict"] = seen.alive_bytes - (state_bytes(saved["state"]) if saved else 0)
            if saved:
                optimizer.load_state_dict(saved)
                del saved
                alive["load_state_dict"] = seen.alive_bytes
                optimizer.step()
                alive["load_state_dict and a step"] = seen.alive_bytes
        if max(alive.values()) > limit:
            alive[max(alive, key=lambda when: alive[when])] = seen.alive_after_collection()
        return alive

    lone = sizes.made()
    reference = [parameter for group in lone for parameter in group]
    give(reference, 0)
    optimizer = torch.optim.AdamW([{"params": group} for group in lone], **defaults)
    optimizer.step()
    each = {p: sum(v.nbytes for v in one.values()) for p, one in optimizer.state.items()}
    limit = sum(each.values()) // sizes.ranks + max(each.values())

    results, logs = run(sizes.ranks, job)

    for rank, alive in enumerate(results):
        came = [parameter for group in everywhere[rank] for parameter in group]
        for number, (one, right) in enumerate(zip(came, reference, strict=True)):
            moved = (one.detach() - 0.5).sign() == (right.detach() - 0.5).sign()
            assert moved.all(), f"ShardedOptimizer, {case}, rank {rank}: parameter {number} does not move as it should"
        for when, size in alive.items():
            assert size <= limit, (
                f"ShardedOptimizer, {case}, rank {rank} of {sizes.ranks}: {size} bytes are alive after {when}; the "
                f"whole state is {sum(each.values())}, at most {limit} were wanted\n{_why(when)}"
            )
    of_steps(logs, [p.nbytes for p in reference if p.requires_grad], case)
    del close


def _why(when: str) -> str:
    if when == "a step":
        return (
            "give each parameter to the rank that has least so far, by bytes; frozen ones have no state; no copy of a "
            "parameter stays, contiguous or not"
        )
    return "what was gathered for the dict is not kept, and of a dict that is loaded only the share"


def of_steps(logs: list[list[Any]], sizes: list[int], case: str) -> None:
    """A step makes only broadcast and all_gather calls, of few bytes."""
    log = logs[0][logs[0].index("step") : logs[0].index("end")]
    calls = [entry for entry in log if isinstance(entry, Call) and entry.kind != "barrier"]
    total = sum(call.nbytes * (len(logs) if call.kind == "all_gather" else 1) for call in calls)
    limit = sum(sizes) + len(logs) * max(sizes)
    for call in calls:
        assert call.kind in ("broadcast", "all_gather"), f"step, {case}: an {call} came; it takes no reductions"
    assert total <= limit, (
        f"step, {case}: {total} bytes are sent, at most {limit} were wanted\n"
        "only parameters travel, each once, in their own dtype; an all_gather counts what every rank puts in"
    )


# 10.8 values


@requirement("10.8")
def test_a_step_by_hand(subject: Subject, close: Close) -> None:
    """SGD with rate 0.5: [1, 2] and [3] with gradients [2, 4] and [-2] become [0, 0] and [4] on both ranks."""
    every = [[torch.tensor([1.0, 2.0]), torch.tensor([3.0])] for _ in range(2)]
    kind = subject.ShardedOptimizer

    def job(rank: int) -> Any:
        mine = [nn.Parameter(tensor) for tensor in every[rank]]
        optimizer = kind(mine, torch.optim.SGD, lr=0.5)
        mine[0].grad, mine[1].grad = torch.tensor([2.0, 4.0]), torch.tensor([-2.0])
        optimizer.step()
        return copies(mine)

    results, _ = run(2, job)

    for rank, came in enumerate(results):
        for number, right in enumerate(([0.0, 0.0], [4.0])):
            what = f"SGD at 0.5, [1, 2] and [3] with gradients [2, 4] and [-2], rank {rank}: parameter {number}"
            hint = "each rank steps its share, then every parameter comes to all ranks from where it was stepped"
            close(came[number], torch.tensor(right), what, hint=hint)


def steps(count: int = 3, missing: tuple[tuple[int, ...], ...] = ()) -> Script:
    """Steps with new gradients; in step k those of `missing[k]` are None."""

    def script(make: Make, own: list[nn.Parameter]) -> list[list[Tensor]]:
        optimizer, seen = make(own), []
        for k in range(count):
            give(own, k, missing[k % len(missing)] if missing else ())
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in own if p.requires_grad), "zero_grad() leaves gradients"
            seen.append(copies(own))
        return seen

    return script


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, LR),
    "Adam": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, MOMENTUM),
}


@requirement("10.8")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_the_unsharded_ones(subject: Subject, close: Close, rng: torch.Generator, name: str) -> None:
    """Three steps on 1, 2 and 3 ranks, with strided, 0-dimensional and frozen parameters in two dtypes."""
    hint = "what is given besides optimizer_class is passed on; parameters travel in their own dtype"
    own = parameters(rng, 5, (2, 3), (), (4, torch.float32), (3, 2), 1, frozen=[5], strided=[4])
    for size in {"AdamW": (2, 3), "SGD": (1, 2), "Adam": (2,)}[name]:
        agree(subject, close, size, own, *OPTIMIZERS[name], steps(), f"{name} on {size} ranks", hint)


@requirement("10.8")
def test_the_default_is_adamw(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Without an optimizer_class it is AdamW with its defaults; a generator of parameters will do."""
    own = parameters(rng, 5, 3)
    kind = subject.ShardedOptimizer
    expected = alone(own, torch.optim.AdamW, {}, steps())

    came = on_ranks(2, own, lambda mine: kind(p for p in mine), steps())

    same_everywhere(close, came, expected, "ShardedOptimizer(generator)")


@requirement("10.8")
def test_more_ranks_than_parameters(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A rank without a share takes part."""
    agree(subject, close, 3, parameters(rng, 4), torch.optim.SGD, MOMENTUM, steps(), "one parameter on 3 ranks")
    agree(
        subject, close, 2, parameters(rng, 4, 2, frozen=[0]), torch.optim.AdamW, LR, steps(), "one trainable parameter"
    )


@requirement("10.8")
def test_parameters_without_a_gradient(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What has no gradient, in some steps, or never, does not move; AdamW's decay included."""
    script = steps(4, missing=((1,), (0, 1), (1, 2), (0, 1, 2, 3)))
    for cls, defaults in ((torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5}), (torch.optim.SGD, MOMENTUM)):
        agree(subject, close, 2, parameters(rng, 3, 2, 4, 1), cls, defaults, script, f"{cls.__name__}, None gradients")


def grouped(make: Make, own: list[nn.Parameter]) -> list[list[Tensor]]:
    """Three groups with hyperparameters of their own; then steps."""
    rates: dict[str, Any] = {"params": own[:2], "lr": 0.3}
    groups = [rates, {"params": own[2], "weight_decay": 0.5}, {"params": own[3:]}]
    return steps()(lambda _: make(groups), own)


@requirement("10.8")
def test_groups(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Each group has its hyperparameters."""
    for cls, defaults in ((torch.optim.AdamW, LR), (torch.optim.SGD, MOMENTUM)):
        agree(subject, close, 2, parameters(rng, 3, 2, 4, 1), cls, defaults, grouped, f"{cls.__name__}, groups")


@requirement("10.8")
def test_param_groups_are_those_of_the_class(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """`param_groups` holds every parameter and hyperparameter on every rank, as the class has them."""
    own = parameters(rng, 3, 2, 4, frozen=[1])
    groups: list[dict[str, Any]] = [{"params": own[:1], "lr": 0.3}, {"params": own[1:]}]
    expected = torch.optim.AdamW(groups, **LR).param_groups
    kind = subject.ShardedOptimizer
    del close

    def job(rank: int) -> Any:
        optimizer = kind([{"params": own[:1], "lr": 0.3}, {"params": own[1:]}], torch.optim.AdamW, **LR)
        return optimizer.param_groups, isinstance(optimizer, torch.optim.Optimizer)

    results, _ = run(2, job)

    for rank, (came, right) in enumerate(results):
        assert right, "ShardedOptimizer(…) is no torch.optim.Optimizer"
        assert len(came) == 2, f"param_groups on rank {rank}: {len(came)} groups came, 2 were wanted"
        for one, other in zip(came, expected, strict=True):
            ids = [[id(p) for p in group["params"]] for group in (one, other)]
            assert ids[0] == ids[1], f"param_groups on rank {rank}: they hold other parameters than those given"
            plain = [{key: value for key, value in group.items() if key != "params"} for group in (one, other)]
            assert plain[0] == plain[1], f"param_groups on rank {rank}: {plain[0]} came, {plain[1]} was wanted"


def scheduled(scheduler: Any, count: int = 4) -> Script:
    """Steps under a scheduler."""

    def script(make: Make, own: list[nn.Parameter]) -> list[list[Tensor]]:
        optimizer, seen = make(own), []
        plan = scheduler(optimizer)
        for k in range(count):
            give(own, k)
            optimizer.step()
            plan.step()
            seen.append(copies(own))
        return seen

    return script


WRITTEN = "what is written into param_groups, under whatever key, counts from the next step on"
SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.5),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda k: 1.0 / (k + 1)),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.5, total_steps=6),
}


@requirement("10.8")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_reach_every_share(subject: Subject, close: Close, rng: torch.Generator, name: str) -> None:
    """What a scheduler writes into `param_groups` counts from the next step on: rates, into a tensor too, and momentum
    with OneCycleLR.
    """
    momentum = {**MOMENTUM, "lr": torch.tensor(0.1, dtype=torch.float64)} if name == "LambdaLR" else MOMENTUM
    for cls, defaults in ((torch.optim.SGD, momentum), (torch.optim.AdamW, LR))[: 2 if name == "OneCycleLR" else 1]:
        script = scheduled(SCHEDULERS[name])
        agree(
            subject, close, 2, parameters(rng, 3, 2, 4), cls, defaults, script, f"{cls.__name__} under {name}", WRITTEN
        )


def by_hand(make: Make, own: list[nn.Parameter]) -> list[list[Tensor]]:
    """Hyperparameters of two groups change between steps, by hand."""
    optimizer, seen = make([{"params": own[:2]}, {"params": own[2:]}]), []
    for k in range(4):
        give(own, k)
        optimizer.step()
        seen.append(copies(own))
        optimizer.param_groups[k % 2]["lr"] *= 3.0
        optimizer.param_groups[1]["weight_decay"] = 0.2 * k
        for group in optimizer.param_groups:
            group.update({"betas": (0.5, 0.9 - 0.1 * k)} if "betas" in group else {"momentum": 0.3 + 0.1 * k})
    return seen


@requirement("10.8")
def test_hyperparameters_changed_by_hand(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """What is written into `param_groups` counts from the next step on."""
    for cls, defaults in ((torch.optim.AdamW, LR), (torch.optim.SGD, MOMENTUM)):
        agree(
            subject,
            close,
            2,
            parameters(rng, 3, 2, 4),
            cls,
            defaults,
            by_hand,
            f"{cls.__name__} changed by hand",
            WRITTEN,
        )


def growing(make: Make, own: list[nn.Parameter]) -> list[list[Tensor]]:
    """Groups are added between steps, one with a rate of its own."""
    optimizer, seen = make(own[:2]), []
    for k in range(4):
        give(own, k)
        optimizer.step()
        seen.append(copies(own))
        if k == 0:
            optimizer.add_param_group({"params": own[2:3], "lr": 0.01})
        if k == 1:
            optimizer.add_param_group({"params": own[3]})
            optimizer.param_groups[0]["lr"] = 0.02
    return seen


@requirement("10.8")
def test_groups_added_between_steps(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A group added later is stepped from then on; the others keep their state."""
    for size, cls, defaults in ((2, torch.optim.AdamW, LR), (3, torch.optim.SGD, MOMENTUM)):
        what = f"{cls.__name__} with groups added, {size} ranks"
        agree(subject, close, size, parameters(rng, 3, 4, 2, 5), cls, defaults, growing, what)


@requirement("10.8")
def test_closures(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """`step` calls its closure once, with gradients on, and returns its value."""
    counts = [0, 0]

    def script(make: Make, own: list[nn.Parameter], rank: int = 0) -> list[list[Tensor]]:
        optimizer, seen = make(own), []
        for _ in range(2):

            def closure() -> Tensor:
                counts[rank] += 1
                optimizer.zero_grad()
                loss = torch.stack([p.sin().sum() for p in own]).sum()
                loss.backward()
                return loss

            value = optimizer.step(closure)
            assert isinstance(value, Tensor), f"step(closure): a {type(value).__name__} came, its value was wanted"
            seen.append([value.detach().clone(), *copies(own)])
        none = optimizer.step()
        assert none is None, f"step(): {none} came, None was wanted without a closure"
        return seen

    own = parameters(rng, 3, 2, 4)
    agree(subject, close, 2, own, torch.optim.SGD, MOMENTUM, script, "step(closure)", by_rank=True)
    # The class alone, and rank 0, count in the first place.
    assert counts == [4, 2], f"step(closure) on 2 ranks: called {[counts[0] - 2, counts[1]]} times in two steps"


@requirement("10.8")
def test_the_sharded_optimizer_is_written_from_scratch(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """None of torch's wrappers is reached, while the values are right."""
    own = parameters(rng, 3, 2)
    expected = alone(own, torch.optim.AdamW, LR, steps(1))
    kind = subject.ShardedOptimizer

    with forbid(wrappers(), "ShardedOptimizer"):
        came = on_ranks(2, own, lambda mine: kind(mine, torch.optim.AdamW, **LR), steps(1))

    for number, right in enumerate(expected[0]):
        close(came[1][0][number], right, f"from scratch, rank 1: parameter {number}", tolerance=1e-2)
