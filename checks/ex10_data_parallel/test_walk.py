"""A walk over steps of training (10.2 to 10.6), in which everything is drawn together."""

import contextlib
import random
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.testing import Aspect, Close, Step, Subject, Walk, walk_check

from .meeting import Entry
from .ranks import Ranks, note
from .reference import (
    Back,
    Bag,
    Gradients,
    backward,
    bags,
    bucket_calls,
    buckets,
    finish,
    gradients,
    late,
    misfit,
    near,
    sent,
    waits,
)

ROWS: dict[str, tuple[float, float]] = {"plain": (-2.0, 2.0), "large": (500.0, 1000.0), "zero": (0.0, 0.0)}
# A cap in bytes for five parameters of 24, 16, 32, 40 and 8 bytes, and the parameters, by kind.
KINDS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((3, 2, 4, 5, 1), {}),
    "dtypes": (((3, torch.float32), (1, 2), (4, torch.bfloat16), (5, torch.bfloat16), ()), {}),
    "tied": ((3, (2, 1), 4, 5, 1), {"tied": [1, 3], "frozen": [2]}),
}


@dataclass
class Team:
    """Replicas on their ranks, and what .grad has to hold."""

    models: list[Bag]
    parallels: list[Any]
    cap: float
    held: Gradients


@dataclass
class Teams:
    """The ranks of a walk, and what trains on them, made when it is first needed."""

    subject: Subject
    ranks: dict[int, Ranks] = field(default_factory=dict)
    teams: dict[tuple[Any, ...], Team] = field(default_factory=dict)

    def at(self, size: int, cap: float, kind: str, name: str = "") -> Team:
        """The replicas of a kind on some ranks."""
        key = (size, cap, kind, name)
        if key not in self.teams:
            make, (shapes, options) = self.subject.DataParallel, KINDS[kind]
            models = bags(size, torch.Generator().manual_seed(len(self.teams)), *shapes, **options)
            self.ranks.setdefault(size, Ranks(size))
            parallels = self.ranks[size].run(lambda rank: make(models[rank], bucket_cap_mb=cap / 2**20))
            self.teams[key] = Team(models, parallels, cap, [None] * len(shapes))
        return self.teams[key]


class Training(Walk):
    """Steps of replicas."""

    aspects = (
        Aspect(
            "backwards",
            "10.6",
            {
                "": "one",
                "two backwards, the first under no_sync": "two",
                "all backwards under no_sync": "quiet",
                "a no_sync inside another": "nested",
                "an exception under no_sync": "failing",
            },
        ),
        Aspect(
            "clear", "10.6", {"": "none", "gradients kept from before": "keep", "gradients zeroed before": "zero"}, 0.4
        ),
        Aspect(
            "missing",
            "10.5",
            {
                "": "nothing",
                "gradients missing on rank 0": "first",
                "gradients missing on the last rank": "last",
                "gradients missing on all ranks": "all",
                "other gradients missing on each rank": "each",
                "the last rank runs no backward": "idle",
            },
        ),
        Aspect(
            "order",
            "10.4",
            {"": "back", "gradients from the first to the last": "forth", "gradients in any order": "any"},
        ),
        Aspect("cap", "10.3", {"": 56, "a bucket for each": 1, "one bucket": 1000, "a cap of 40 bytes": 40}, 0.4),
        Aspect("kind", "10.3", {"": "plain", "three dtypes": "dtypes", "tied and frozen parameters": "tied"}, 0.4),
        Aspect("ranks", "10.2", {"": 2, "on one rank": 1, "on three ranks": 3}, 0.4),
        Aspect(
            "rows",
            "10.2",
            {"": "plain", "large rows": "large", "rows of zero": "zero", "no rows on rank 0": "none"},
            0.4,
        ),
        Aspect(
            "before",
            "10.2",
            {
                "": "nothing",
                "after a step of SGD": "sgd",
                "after other weights": "load",
                "after edits of .data": "data",
                "in eval": "eval",
                "after a forward without backward": "forward",
                "after a forward that fails": "fails",
            },
        ),
        Aspect("beside", "10.2", {"": False, "beside another model's step": True}, 0.25),
    )
    otherwise = ""

    def begin(self, subject: Subject) -> Teams:
        return Teams(subject)

    def step(self, state: Teams, step: Step) -> None:
        team = state.at(step["ranks"], step["cap"], step["kind"])
        other = state.at(step["ranks"], 56, "plain", "beside") if step["beside"] else None
        ranks = state.ranks[step["ranks"]]
        change(team, step["before"], step.rng())
        clear(team, step["clear"])
        plan = planned(team, step)
        expect(team, plan)
        starts = [len(log) for log in ranks.logs]
        # Where a gradient is missing, or no_sync ends with finish, buckets start later on some ranks than on others.
        between = step["missing"] == "nothing" and step["backwards"] != "quiet"

        def job(rank: int) -> Gradients:
            parallel, model = team.parallels[rank], team.models[rank]
            outside(parallel, step["before"])
            if not between:
                beside(other, rank)
            run_all(parallel, plan[rank], step["backwards"])
            if between:
                beside(other, rank)
            finish(parallel)
            return gradients(model)

        results = ranks.run(job)

        for rank, came in enumerate(results):
            log = alone(ranks.logs[rank][starts[rank] :])
            # What starts late under other caps is found where the order is drawn as well, and costs 10.4.
            sends(log, team, f"rank {rank}", step["cap"] == 56 or step["order"] != "back")
            values(came, team.held, f"rank {rank}")
        for log in ranks.logs:
            log.clear()


def beside(other: Team | None, rank: int) -> None:
    """A step of another model."""
    if other is not None:
        note("other")
        backward(other.parallels[rank], Back((0, 1, 2, 3, 4), (1.0 + rank,)))
        finish(other.parallels[rank])
        other.models[rank].zero_grad()
        note("other's end")


def change(team: Team, how: str, rng: torch.Generator) -> None:
    """What happens to weights between steps, on every rank alike."""
    seed = int(torch.randint(1000, (1,), generator=rng))
    for model in team.models:
        same = torch.Generator().manual_seed(seed)
        model.train(how != "eval")
        for parameter in model.all:
            values = torch.rand(parameter.shape, generator=same, dtype=torch.float64).to(parameter.dtype)
            with torch.no_grad():
                if how == "sgd" and parameter.grad is not None:
                    parameter.sub_(parameter.grad.clamp(-1, 1), alpha=0.1)
                elif how == "load":
                    parameter.copy_(values)
                elif how == "data":
                    parameter.data = values.clone()


def clear(team: Team, how: str) -> None:
    """What happens to old gradients."""
    if how != "keep":
        for model in team.models:
            model.zero_grad(set_to_none=how == "none")
        team.held = [None if one is None or how == "none" else torch.zeros_like(one) for one in team.held]


def planned(team: Team, step: Step) -> list[list[Back]]:
    """The backwards of each rank."""
    draw, size = random.Random(step.seed), len(team.models)
    low, high = ROWS.get(step["rows"], ROWS["plain"])
    plan: list[list[Back]] = []
    everywhere = draw.sample(range(5), draw.randint(1, 3))
    for rank in range(size):
        lacks: list[int] = []
        if step["missing"] == "all":
            lacks = everywhere
        elif step["missing"] == "each" or step["missing"] == {0: "first", size - 1: "last"}.get(rank):
            lacks = draw.sample(range(5), draw.randint(1, 3))
        order = [i for i in range(5) if i not in lacks]
        if step["order"] == "forth":
            order.reverse()
        elif step["order"] == "any":
            draw.shuffle(order)
        backs = []
        for number in range({"one": 1, "two": 2, "nested": 3, "failing": 2, "quiet": 2}[step["backwards"]]):
            count = 0 if step["rows"] == "none" and rank == 0 else draw.randint(1, 2)
            rows = tuple(draw.uniform(low, high) for _ in range(count))
            backs.append(Back(tuple(order), rows, quiet=number > 0 or step["backwards"] == "quiet"))
        backs.reverse()  # The one outside no_sync is the last.
        plan.append([] if step["missing"] == "idle" and rank == size - 1 else backs)
    return plan


def expect(team: Team, plan: list[list[Back]]) -> None:
    """Adds to what .grad has to hold what the backwards of all ranks give, divided by their number."""
    for i, parameter in enumerate(team.models[0].all):
        backs = [back for backs in plan for back in backs if i in back.order]
        if backs and parameter.requires_grad:
            total = sum(sum(back.rows) for back in backs) / len(plan)
            new = parameter.detach().double().cos() * total
            held = team.held[i]
            team.held[i] = (new if held is None else held.double() + new).to(parameter.dtype)


def outside(parallel: Any, how: str) -> None:
    """Forwards whose backward never comes."""
    x = torch.ones(2, dtype=torch.float64)
    if how == "forward":
        parallel(x, order=(0, 1)).sum()
    elif how == "fails":
        with contextlib.suppress(IndexError):
            parallel(x, order=(0, 99))


def run_all(parallel: Any, backs: list[Back], how: str) -> None:
    """The backwards of a rank."""
    if not backs or how not in ("nested", "failing"):
        for back in backs:
            backward(parallel, back)
    elif how == "nested":
        with parallel.no_sync():
            backward(parallel, backs[0])
            backward(parallel, backs[1])
        backward(parallel, backs[2])
    else:
        with contextlib.suppress(ArithmeticError), parallel.no_sync():
            backward(parallel, backs[0])
            raise ArithmeticError("a bad batch")
        backward(parallel, backs[1])


def alone(log: list[Entry]) -> list[Entry]:
    """A step's log without what another model does in it."""
    if "other" not in log:
        return log
    return [*log[: log.index("other")], *log[log.index("other's end") + 1 :]]


def sends(log: list[Entry], team: Team, where: str, timely: bool) -> None:
    """The calls of a step: the rule's buckets, each as soon as it may."""
    model = team.models[0]
    groups = buckets(model, team.cap)
    early = [one for one in sent(log) if one.place not in ("backward", "finish")]
    assert not early, f"a step on {where}: {early[0].call} in {early[0].place}, where nothing is sent"
    calls = bucket_calls(log, model, groups)
    about = misfit(calls, model, groups)
    inside, running = waits(log)
    about = about or ("backward waits for a call" if inside and timely else "")
    about = about or ("finish leaves a call running" if running else "")
    about = about or (late(log, calls, groups) if timely else "")
    assert not about, f"a step on {where}: {about}"


def values(came: Gradients, held: Gradients, where: str) -> None:
    """What .grad holds."""
    for i, (one, other) in enumerate(zip(came, held, strict=True)):
        if other is None:
            assert one is None, f"a step on {where}: p{i}.grad is a tensor, None was wanted"
        else:
            Close(near(other.dtype))(one, other, f"a step on {where}: p{i}.grad")


test_steps_in_any_order = walk_check(Training(), 28)
