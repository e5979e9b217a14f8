"""A walk over steps of the sharded optimizer (10.8, 10.9), in which everything is drawn together."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harness.testing import Aspect, Close, Step, Subject, Walk, walk_check

from .ranks import Ranks
from .reference import clones, copies, give, parameters, same_state

CLASSES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.02}),
    "SGD": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1}),
}


@dataclass
class Trainee:
    """Parameters and their optimizer, the class alone or a sharded one, to which the same things happen."""

    make: Callable[[Any], Any]
    own: list[nn.Parameter]
    later: list[nn.Parameter]
    groups: list[list[nn.Parameter]] = field(default_factory=list)
    optimizer: Any = None
    saved: Any = None

    def __post_init__(self) -> None:
        self.groups = [self.own[:2], self.own[2:]]
        self.optimizer = self.build()

    def build(self) -> Any:
        """A new optimizer over what there is."""
        return self.make([{"params": list(group)} for group in self.groups])

    @property
    def every(self) -> list[nn.Parameter]:
        """All parameters."""
        return [parameter for group in self.groups for parameter in group]

    def act(self, step: Step) -> Any:
        """What was drawn for one step; the dict that is saved after it."""
        draw = random.Random(step.seed)
        self.weights(step["weights"], step.seed)
        if step["group"] and self.later:
            self.groups.append([self.later.pop()])
            self.optimizer.add_param_group({"params": list(self.groups[-1]), "lr": 0.01})
        self.checkpoint(step["dict"])
        self.hyperparameters(step["hyper"], draw)
        count = len(self.every)
        missing = {"some": draw.sample(range(count), 2), "all": range(count)}.get(step["missing"], ())
        scale = {"large": 1000.0, "zero": 0.0}.get(step["gradients"], 1.0)

        def gradients() -> float:
            give(self.every, step.seed % 97, missing)
            for parameter in self.every:
                if parameter.grad is not None:
                    parameter.grad *= scale
            return 7.5

        if step["closure"]:
            self.optimizer.zero_grad()
            value = self.optimizer.step(gradients)
            assert value == 7.5, f"step(closure): {value} came, its value was wanted"
        else:
            gradients()
            self.optimizer.step()
        return self.optimizer.state_dict() if step["look"] else None

    def weights(self, how: str, seed: int) -> None:
        """What else happens to parameters."""
        rng = torch.Generator().manual_seed(seed)
        for parameter in self.every if how else ():
            values = torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter.dtype)
            with torch.no_grad():
                parameter.copy_(values) if how == "load" else parameter.data.add_(values)

    def checkpoint(self, how: str) -> None:
        """What is saved and loaded before a step."""
        if not how:
            return
        state = self.optimizer.state_dict()
        if how == "earlier" and self.saved is not None and len(self.saved["param_groups"]) == len(self.groups):
            self.optimizer.load_state_dict(self.saved)
        elif how == "back":
            self.optimizer.load_state_dict(state)
        elif how == "anew":
            self.optimizer = self.build()
            self.optimizer.load_state_dict(state)
        elif how == "empty":
            self.optimizer.load_state_dict(self.build().state_dict())
        if how in ("kept", "earlier"):
            self.saved = copy.deepcopy(state)

    def hyperparameters(self, how: str, draw: random.Random) -> None:
        """What is changed by hand."""
        group = self.optimizer.param_groups[draw.randrange(len(self.groups))]
        if how == "rate":
            group["lr"] = draw.uniform(0.001, 0.05)
        elif how == "decay":
            group["weight_decay"] = draw.uniform(0.0, 0.3)
        elif how == "moments":
            one = draw.uniform(0.3, 0.9)
            group.update({"betas": (one, 0.95)} if "betas" in group else {"momentum": one})


@dataclass
class Trainees:
    """The class alone, and the sharded one on its ranks."""

    subject: Subject
    ranks: dict[int, Ranks] = field(default_factory=dict)
    made: dict[tuple[Any, ...], tuple[Trainee, list[Trainee]]] = field(default_factory=dict)

    def at(self, size: int, name: str, kind: str) -> tuple[Trainee, list[Trainee]]:
        """Those of a class on some ranks, made when they are first needed."""
        key = (size, name, kind)
        if key not in self.made:
            sharded, (cls, defaults) = self.subject.ShardedOptimizer, CLASSES[name]
            rng = torch.Generator().manual_seed(len(self.made))
            own = parameters(rng, 3, (2, 3), 1, 4, (), frozen=[3], strided=[1])
            later = parameters(rng, 2, 5)
            if kind == "float32":
                own = [nn.Parameter(p.detach().float(), p.requires_grad) if i % 2 else p for i, p in enumerate(own)]
            self.ranks.setdefault(size, Ranks(size))
            alone = Trainee(lambda groups: cls(groups, **defaults), clones(own), clones(later))
            pairs = [(clones(own), clones(later)) for _ in range(size)]
            many = self.ranks[size].run(
                lambda rank: Trainee(lambda groups: sharded(groups, cls, **defaults), *pairs[rank])
            )
            self.made[key] = alone, many
        return self.made[key]


class Stepping(Walk):
    """Steps of sharded optimizers."""

    aspects = (
        Aspect(
            "dict",
            "10.9",
            {
                "": "",
                "after saving": "kept",
                "after saving and loading": "back",
                "after loading what was saved earlier": "earlier",
                "after loading into a new one": "anew",
                "after loading an empty state": "empty",
            },
            0.4,
        ),
        Aspect("look", "10.9", {"": False, "and state_dict() after it": True}, 0.3),
        Aspect("group", "10.8", {"": False, "after add_param_group": True}, 0.15),
        Aspect(
            "hyper",
            "10.8",
            {"": "", "with another rate": "rate", "with another decay": "decay", "with other moments": "moments"},
        ),
        Aspect("missing", "10.8", {"": "", "some gradients None": "some", "all gradients None": "all"}, 0.4),
        Aspect("closure", "10.8", {"": False, "with a closure": True}, 0.3),
        Aspect("gradients", "10.8", {"": "", "large gradients": "large", "gradients of zero": "zero"}, 0.3),
        Aspect("weights", "10.8", {"": "", "after other weights": "load", "after edits of .data": "data"}, 0.3),
        Aspect("kind", "10.8", {"": "float64", "two dtypes": "float32"}, 0.3),
        Aspect("ranks", "10.8", {"": 2, "on one rank": 1, "on three ranks": 3}, 0.4),
        Aspect("name", "10.8", {"": "AdamW", "SGD": "SGD", "Adam with amsgrad": "Adam"}, 0.5),
    )
    otherwise = ""

    def begin(self, subject: Subject) -> Trainees:
        return Trainees(subject)

    def step(self, state: Trainees, step: Step) -> None:
        alone, many = state.at(step["ranks"], step["name"], step["kind"])
        expected_dict = alone.act(step)
        expected = copies(alone.every)

        dicts = state.ranks[step["ranks"]].run(lambda rank: many[rank].act(step))

        for rank, trainee in enumerate(many):
            for number, (one, other) in enumerate(zip(trainee.every, expected, strict=True)):
                what = f"after a step on rank {rank}: parameter {number}"
                exact = other.dtype == torch.float64
                Close(1e-11 if exact else 1e-5)(one.detach().clone(), other, what)
                assert torch.equal(one, many[0].every[number]), f"{what}: not the bits of rank 0"
            if expected_dict is not None:
                same_state(Close(1e-11), dicts[rank], expected_dict, f"state_dict() on rank {rank}")
        for log in state.ranks[step["ranks"]].logs:
            log.clear()


test_sharded_steps_in_any_order = walk_check(Stepping(), 20)
