"""Walks over the cache (9.3) and over attention (9.2): sequences and calls in which everything is drawn together."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from harness.testing import Aspect, Close, Step, Subject, Walk, refuses, walk_check

from .paged import Case, attended, strided
from .tables import Known, state

CLOSE = Close(1e-9)


class Sequences(Walk):
    """A cache in which sequences come, grow, fork and go."""

    aspects: ClassVar[tuple[Aspect, ...]] = (
        Aspect("forks", "9.3", {"": 0, "forks": 1, "many forks": 3}, rate=0.8),
        Aspect("frees", "9.3", {"": 0, "frees": 1, "many frees": 2}, rate=0.7),
        Aspect("pool", "9.3", {"": 30, "7 blocks": 7, "4 blocks": 4}, rate=0.7),
        Aspect("block", "9.3", {"": 4, "blocks of 1": 1, "blocks of 2": 2, "blocks of 3": 3}),
    )
    otherwise = "9.3"

    def begin(self, subject: Subject) -> Subject:
        """Each step builds a cache of its own."""
        return subject

    def step(self, subject: Subject, step: Step) -> None:
        """A dozen calls."""
        rng, size = step.rng(), step["block"]
        known = Known(subject, step["pool"], size)
        acts = ["append"] * 3 + ["fork"] * step["forks"] + ["free"] * step["frees"]
        called: list[str] = []
        for _ in range(12):
            act, sequence = acts[self.number(rng, 0, len(acts) - 1)], self.number(rng, 0, 3)
            length = len(known.rows.get(sequence, []))
            if act == "append":
                count = self.number(rng, 0, 2 * size + 1)
                self.append(known, sequence, count, called)
            elif act == "free" and length:
                called.append(f"free({sequence})")
                known.free(sequence)
            elif act == "fork" and length and (new := [one for one in range(5) if one not in known.rows]):
                count = self.number(rng, 1, length)
                called.append(f"fork({sequence}, {new[0]}, {count})")
                known.fork(sequence, new[0], count)
            known.holds(CLOSE, f"PagedKVCache of {step['pool']} blocks of {size}: {'; '.join(called)}")

    def append(self, known: Known, sequence: int, count: int, called: list[str]) -> None:
        """Slots, or OutOfBlocksError where the plain rules say so."""
        table, length = known.cache.block_table(sequence), len(known.rows.get(sequence, []))
        copies = count > 0 and length % known.block_size > 0 and known.cache.allocator.ref_count(table[-1]) > 1
        needed = -(-(length + count) // known.block_size) - len(table) + copies
        called.append(f"append({sequence}, {count})")
        if needed <= known.cache.allocator.num_free:
            known.add(sequence, count)
            return
        before = state(known)
        refuses(known.subject.OutOfBlocksError, lambda: known.cache.append(sequence, count), "; ".join(called))
        now = state(known)
        assert now == before, f"{'; '.join(called)}: (tables, lengths, counts, num_free) {before} has become {now}"
        called[-1] += ", which raises"

    @staticmethod
    def number(rng: torch.Generator, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))


class Attending(Walk):
    """Calls of paged_attention."""

    aspects: ClassVar[tuple[Aspect, ...]] = (
        Aspect(
            "lengths",
            "9.2",
            {
                "": ((5, 3), (5, 3)),
                "pieces": ((7, 9, 4), (3, 5, 2)),
                "single tokens": ((8, 1, 5), (1, 1, 1)),
                "all kinds": ((8, 9, 1, 6), (8, 1, 1, 3)),
                "one token": ((1,), (1,)),
            },
        ),
        Aspect(
            "heads",
            "9.2",
            {"": (4, 2, 3), "6 heads, 3 groups": (6, 3, 2), "one of each": (1, 1, 5), "one group": (3, 1, 1)},
        ),
        Aspect("block", "9.2", {"": 4, "blocks of 1": 1, "blocks of 3": 3, "blocks of 16": 16}),
        Aspect("dtype", "9.2", {"": torch.float64, "float32": torch.float32}),
        Aspect("fill", "9.2", {"": 0.0, "NaN in other slots": math.nan, "inf in other slots": math.inf}),
        Aspect("further", "9.2", {"": 0, "-1 in further entries": -1, "2 ** 62 in further entries": 2**62}),
        Aspect("spare", "9.2", {"": 2, "no further columns": 0}),
        Aspect("scores", "9.2", {"": (1.0, (0, 0)), "large scores": (20.0, (0, 0)), "one-sided": (0.3, (20.0, 30.0))}),
        Aspect("layout", "9.2", {"": (), "strided": ("q", "keys", "values"), "strided tables": ("block_tables",)}),
        Aspect(
            "mode", "9.2", {"": torch.enable_grad, "under no_grad": torch.no_grad, "in inference": torch.inference_mode}
        ),
    )
    otherwise = "9.2"

    def begin(self, subject: Subject) -> Subject:
        """Calls share nothing."""
        return subject

    def step(self, subject: Subject, step: Step) -> None:
        """One call."""
        scale, offset = step["scores"]
        context, queries = step["lengths"]
        options: dict[str, Any] = {"fill": step["fill"], "further": step["further"], "spare": step["spare"]}
        case = Case(
            step.rng(),
            context,
            queries,
            step["heads"],
            step["block"],
            step["dtype"],
            scale=scale,
            offset=offset,
            **options,
        )
        case.given |= {name: strided(case.given[name]) for name in step["layout"]}
        versions = {name: tensor._version for name, tensor in case.given.items()}
        mode: Callable[[], Any] = step["mode"]
        with mode():
            came = attended(subject, case)
        exact = 1e-9 if case.dtype == torch.float64 else 5e-3 if step["scores"] != (1.0, (0, 0)) else 5e-6
        CLOSE(came, case.expected().to(case.dtype), str(case), tolerance=exact)
        written = [name for name, tensor in case.given.items() if tensor._version != versions[name]]
        assert not written, f"paged_attention: {', '.join(written)} written to, if only to be put back"


test_sequences_in_any_order = walk_check(Sequences(), 6)
test_attention_in_any_order = walk_check(Attending(), 10)
