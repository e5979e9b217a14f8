"""Checkpoints of the sharded optimizer (10.9)."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.testing import Close, Subject, requirement

from .ranks import run
from .reference import Make, alone, clones, copies, give, on_ranks, parameters, same_everywhere, same_state

CLASSES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.1}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


def stepped(make: Make, own: list[nn.Parameter], count: int, missing: tuple[int, ...] = ()) -> Any:
    """An optimizer after some steps."""
    optimizer = make([{"params": own[:2]}, {"params": own[2:], "lr": 0.03}])
    for k in range(count):
        give(own, k, missing)
        optimizer.step()
    return optimizer


def saved_alone(own: list[nn.Parameter], name: str, count: int, missing: tuple[int, ...] = (), **options: Any) -> Any:
    """What the class alone saves after some steps, and the parameters then."""
    cls, defaults = CLASSES[name][0], {**CLASSES[name][1], **options}
    mine = clones(own)
    optimizer = stepped(lambda groups: cls(groups, **defaults), mine, count, missing)
    return copy.deepcopy(optimizer.state_dict()), mine


@requirement("10.9")
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("count", [0, 2])
def test_every_rank_saves_the_whole_state(
    subject: Subject, close: Close, rng: torch.Generator, name: str, count: int
) -> None:
    """`state_dict` has the class's keys and values on every rank, before the first step and after some."""
    own = parameters(rng, 3, 2, (2, 2), 5, 4, frozen=[4])
    expected, _ = saved_alone(own, name, count, missing=(1,))
    kind, (cls, defaults) = subject.ShardedOptimizer, CLASSES[name]
    for size in (2, 3) if count and name == "AdamW" else (2,):
        mine = [clones(own) for _ in range(size)]

        def job(rank: int, mine: list[list[nn.Parameter]] = mine) -> Any:
            return stepped(lambda groups: kind(groups, cls, **defaults), mine[rank], count, (1,)).state_dict()

        results, _ = run(size, job)

        for rank, came in enumerate(results):
            what = f"state_dict() of {name} after {count} steps, rank {rank} of {size}"
            same_state(close, came, expected, what)


@requirement("10.9")
@pytest.mark.parametrize("name", CLASSES)
def test_it_loads_into_the_class_alone(subject: Subject, close: Close, rng: torch.Generator, name: str) -> None:
    """What two ranks save goes on in optimizer_class alone as if never stopped."""
    own = parameters(rng, 3, 2, 5, 4)
    kind, (cls, defaults) = subject.ShardedOptimizer, CLASSES[name]
    mine = [clones(own) for _ in range(2)]

    def job(rank: int) -> Any:
        return stepped(lambda groups: kind(groups, cls, **defaults), mine[rank], 2).state_dict()

    results, _ = run(2, job)

    _, through = saved_alone(own, name, 4)
    for rank, saved in enumerate(results):
        going = clones(mine[rank])
        others: dict[str, Any] = {"lr": 7.0}
        optimizer = cls([{"params": going[:2]}, {"params": going[2:]}], **others)
        optimizer.load_state_dict(saved)
        for k in (2, 3):
            give(going, k)
            optimizer.step()
        for number, (came, right) in enumerate(zip(going, through, strict=True)):
            what = f"{name}: 2 steps on 2 ranks, loaded into the class alone, 2 more: parameter {number}"
            close(came.detach().clone(), right.detach().clone(), what, tolerance=5e-6)


@requirement("10.9")
@pytest.mark.parametrize(
    ("into", "name", "count", "over"),
    [
        (1, "AdamW", 2, 0),
        (2, "AdamW", 2, 3),
        (3, "AdamW", 2, 1),
        (2, "SGD", 2, 0),
        (3, "SGD", 0, 2),
        (2, "AdamW", 0, 2),
    ],
)
def test_it_loads_into_any_number_of_ranks(
    subject: Subject, close: Close, rng: torch.Generator, into: int, name: str, count: int, over: int
) -> None:
    """The class's dict, after some steps or none, goes on on 1, 2 and 3 ranks as if never stopped, over whatever is
    there after `over` steps: state, and hyperparameters.
    """
    own = parameters(rng, 3, 2, 5, 4)
    kind, (cls, defaults) = subject.ShardedOptimizer, CLASSES[name]
    saved, then = saved_alone(own, name, count, missing=(2,))

    def script(make: Make, going: list[nn.Parameter]) -> list[list[Tensor]]:
        optimizer = stepped(make, going, over)
        for group in optimizer.param_groups:
            group["lr"] = 5.0
        with torch.no_grad():
            for one, other in zip(going, then, strict=True):
                one.copy_(other)
        optimizer.load_state_dict(copy.deepcopy(saved))
        seen = []
        for k in (3, 4):
            give(going, k)
            optimizer.step()
            seen.append(copies(going))
        return seen

    expected = alone(own, cls, defaults, script)

    came = on_ranks(into, own, lambda groups: kind(groups, cls, **defaults), script)

    what = f"{name} saved after {count} steps, loaded on {into} ranks over {over} steps of others"
    hint = "the state that was there is replaced, groups too"
    same_everywhere(close, came, expected, what, hint, exact=False)


@requirement("10.9")
def test_it_saves_state_in_three_dtypes(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Strided, 0-dimensional, float32 and bfloat16 parameters' states come whole, after loading too."""
    own = parameters(rng, (3, 2), (4, torch.float32), (), (2, torch.bfloat16), strided=[0])
    expected, _ = saved_alone(own, "AdamW", 2)
    kind, mine = subject.ShardedOptimizer, [clones(own) for _ in range(2)]

    def job(rank: int) -> Any:
        optimizer = stepped(lambda groups: kind(groups, torch.optim.AdamW, lr=0.1), mine[rank], 2)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        return saved, optimizer.state_dict()

    results, _ = run(2, job)

    for rank, both in enumerate(results):
        for came, when in zip(both, ("", " after loading its own"), strict=True):
            same_state(close, came, expected, f"state_dict() of three dtypes{when}, rank {rank}")


@requirement("10.9")
def test_saving_and_loading_copy(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Later steps change neither the dict that was saved nor the one that was given."""
    own = parameters(rng, 3, 2, 5, 4)
    kind = subject.ShardedOptimizer
    for size, name in ((1, "SGD"), (2, "AdamW")):
        options: dict[str, Any] = {"lr": torch.tensor(0.1)} if name == "SGD" else {}
        cls, defaults = CLASSES[name][0], {**CLASSES[name][1], **options}
        given = [copy.deepcopy(saved_alone(own, name, 2, **options)[0]) for _ in range(size)]
        before = copy.deepcopy(given[0])
        mine = [clones(own) for _ in range(size)]

        def job(rank: int, mine: Any = mine, given: Any = given, cls: Any = cls, defaults: Any = defaults) -> Any:
            optimizer = stepped(lambda groups: kind(groups, cls, **defaults), mine[rank], 1)
            saved = optimizer.state_dict()
            kept = copy.deepcopy(saved)
            changed(optimizer, mine[rank])
            optimizer.load_state_dict(given[rank])
            changed(optimizer, mine[rank])
            return saved, kept

        results, _ = run(size, job)

        for rank, (saved, kept) in enumerate(results):
            where = f"{name} on {size} ranks, rank {rank}"
            same_state(close, saved, kept, f"{where}: what state_dict() returned, after a later step")
            same_state(close, given[rank], before, f"{where}: what load_state_dict was given, after a later step")


def changed(optimizer: Any, own: list[nn.Parameter]) -> None:
    """A step, and other hyperparameters, in place where they are tensors, as schedulers change them."""
    give(own, 7)
    optimizer.step()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(0.5)
        else:
            group["lr"] = 0.5


@requirement("10.9")
def test_training_goes_on_through_saving_and_loading(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Saving between steps disturbs nothing; schedulers and added groups work after loading."""
    own = parameters(rng, 3, 2, 5, 4)
    kind = subject.ShardedOptimizer

    def script(make: Make, mine: list[nn.Parameter]) -> list[list[Tensor]]:
        optimizer, seen = make(mine[:3]), []
        for k in range(5):
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if k == 2 else None
            give(mine, k)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            seen.append(copies(mine))
            saved = optimizer.state_dict()
            if k == 1:
                optimizer.load_state_dict(saved)
            if k == 3:
                optimizer.add_param_group({"params": mine[3:]})
        return seen

    cls, defaults = CLASSES["AdamW"]
    expected = alone(own, cls, defaults, script)

    came = on_ranks(2, own, lambda groups: kind(groups, cls, **defaults), script)

    same_everywhere(close, came, expected, "AdamW, saved and loaded between steps", exact=False)
