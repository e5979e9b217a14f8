"""A process group whose ranks are threads, and what would hang or differ is an error at once."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class RankError(AssertionError):
    """The ranks' calls do not fit each other."""


class Ranks:
    """Where the ranks of one group meet."""

    def __init__(self, world_size: int) -> None:
        self.calls: dict[int, dict[int, tuple[str, Tensor]]] = {}
        self.made = [0] * world_size
        self.gone: set[int] = set()
        self.changed = threading.Condition()

    def exchange(self, rank: int, call: str, tensor: Tensor) -> list[Tensor]:
        """What all ranks bring to this rank's next call, by rank."""
        with self.changed:
            number = self.made[rank]
            brought = self.calls.setdefault(number, {})
            self.made[rank] += 1
            brought[rank] = call, tensor.detach().clone()
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(brought) == len(self.made) or bool(self.gone - brought.keys()))
            self.calls.pop(number, None)
            if missing := self.gone - brought.keys():
                raise RankError(
                    f"rank {rank} waits in {call}; rank {min(missing)} has ended without that call\n"
                    "all ranks make the same calls in the same order, in backward too"
                )
            made = [brought[other][0] for other in sorted(brought)]
            if len(set(made)) > 1:
                told = "; ".join(f"rank {other} calls {one}" for other, one in enumerate(made))
                raise RankError(f"the ranks' calls differ: {told}")
            return [brought[other][1] for other in sorted(brought)]

    def leave(self, rank: int) -> None:
        """No call of this rank comes any more."""
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()


class Rank:
    """One rank's way to the others, as the contract's Communicator."""

    def __init__(self, rank: int, ranks: Ranks) -> None:
        self.rank, self.world_size = rank, len(ranks.made)
        self._ranks = ranks

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, whose first sizes may differ."""
        call = f"all_gather of {tensor.dtype} [{', '.join(['n', *map(str, tensor.shape[1:])][: tensor.dim()])}]"
        return [part.clone() for part in self._ranks.exchange(self.rank, call, tensor)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all ranks."""
        call = f"all_reduce of {tensor.dtype} {[*tensor.shape]}"
        first, *others = self._ranks.exchange(self.rank, call, tensor)
        total = first.clone()
        for other in others:
            total += other
        return total


def run_ranks(function: Callable[[Rank], Any], world_size: int) -> list[Any]:
    """function(comm) of each rank, a thread each; the error of the first rank that did not fail because of others."""
    ranks, results = Ranks(world_size), [None] * world_size
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = function(Rank(rank, ranks))
        except BaseException as error:
            errors[rank] = error
        finally:
            ranks.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors, key=lambda rank: (isinstance(errors[rank], RankError), rank))]
    return results
