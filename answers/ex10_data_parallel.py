"""The answer to ex10, Data parallel training."""

import copy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _distributed_c10d as c10d
from torch.distributed import Work
from torch.testing._internal.distributed import multi_threaded_pg as threaded

T = TypeVar("T")


class DataParallel(nn.Module):
    """A module that is trained on every rank at once, each with rows of its own.

    Args:
        module: this rank's replica; rank 0's parameters and buffers go to all, in place.
        bucket_cap_mb: the gradients of a bucket take at most this many MiB, unless it holds one parameter alone.

    Attributes:
        module: as given.
    """

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25.0) -> None:
        super().__init__()
        self.module = module
        for tensor in (*module.parameters(), *module.buffers()):
            _broadcast(tensor.detach(), source=0)
        self._buckets = list(_buckets(module, bucket_cap_mb * 2**20))
        self._syncs = True
        self._reset()
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda parameter, n=number: self._ready(parameter, n))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with whatever comes.

        Args:
            args: the module's arguments.
            kwargs: the module's keyword arguments.

        Returns:
            What the module returns.
        """
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward adds to .grad and sends nothing."""
        return self._without_sync()

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    def finish(self) -> None:
        """Ends a step's communication: afterwards every .grad is the average over the ranks.

        Every rank calls it after backward, before gradients are read.
        """
        while len(self._running) < len(self._buckets):
            self._start_next()
        for bucket, (flat, work) in zip(self._buckets, self._running, strict=True):
            work.wait()
            *averages, counts = flat.split([*(parameter.numel() for parameter in bucket), len(bucket)])
            for parameter, average, count in zip(bucket, averages, counts.tolist(), strict=True):
                if count:
                    parameter.grad = average.view(parameter.shape)
        self._reset()

    def _reset(self) -> None:
        self._missing = [set(bucket) for bucket in self._buckets]
        self._running: list[tuple[Tensor, Work]] = []

    def _ready(self, parameter: Tensor, number: int) -> None:
        if not self._syncs:
            return
        self._missing[number].discard(parameter)
        while len(self._running) < len(self._buckets) and not self._missing[len(self._running)]:
            self._start_next()

    @torch.no_grad()
    def _start_next(self) -> None:
        bucket = self._buckets[len(self._running)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        present = torch.tensor([p.grad is not None for p in bucket], dtype=bucket[0].dtype, device=bucket[0].device)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), present])
        flat /= dist.get_world_size()  # Before the sum, which float16 might not hold.
        self._running.append((flat, dist.all_reduce(flat, async_op=True)))


def _broadcast(tensor: Tensor, source: int) -> None:
    data = tensor.contiguous()
    dist.broadcast(data, source)
    if data is not tensor:
        tensor.copy_(data)


def _buckets(module: nn.Module, cap: float) -> Iterator[list[nn.Parameter]]:
    """The trainable parameters, each once, from the last to the first."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in reversed([p for p in module.parameters() if p.requires_grad]):
        if bucket and (size + parameter.nbytes > cap or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def global_mean(losses: Tensor) -> Tensor:
    """The loss whose average over the ranks is the mean over all losses of all ranks.

    Args:
        losses: [n], one for each row of this rank; n differs between ranks and may be 0.

    Returns:
        A scalar in the dtype of losses.
    """
    count = torch.tensor(losses.numel(), device=losses.device)
    dist.all_reduce(count)
    return (losses * (dist.get_world_size() / count.item())).sum()


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is spread over the ranks, each of which steps its own share (ZeRO-1).

    Args:
        params: parameters or groups, as torch's optimizers take them; the same on every rank.
        optimizer_class: works element by element.
        defaults: what optimizer_class takes besides.

    Attributes:
        param_groups: those of optimizer_class over all parameters; changes count from the next step on.
    """

    def __init__(
        self, params: Iterable[Any], optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **defaults: Any
    ) -> None:
        self._owners: dict[Tensor, int] = {}
        self._loads = [0] * dist.get_world_size()
        self._optimizer: torch.optim.Optimizer | None = None
        optimizer = optimizer_class(params, **defaults)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._optimizer = optimizer
        self._show(optimizer)

    def _show(self, optimizer: torch.optim.Optimizer) -> None:
        """Shows the inner optimizer's groups and state as its own, and deals out what has no owner yet."""
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.requires_grad and parameter not in self._owners:
                owner = self._loads.index(min(self._loads))
                self._owners[parameter] = owner
                self._loads[owner] += parameter.nbytes

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps this rank's share, then brings every parameter to all ranks.

        Args:
            closure: computes the loss again; called once on every rank.

        Returns:
            What closure returns; None without one.
        """
        assert self._optimizer is not None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Parameters without a gradient get no step and no state.
        hidden = {p: p.grad for p, owner in self._owners.items() if owner != dist.get_rank()}
        for parameter in hidden:
            parameter.grad = None
        self._optimizer.step()
        for parameter, gradient in hidden.items():
            parameter.grad = gradient
        for parameter, owner in self._owners.items():
            _broadcast(parameter.detach(), source=owner)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do.

        Args:
            param_group: "params", and hyperparameters of its own.
        """
        if self._optimizer is None:  # The base class adds the first groups.
            return super().add_param_group(param_group)
        self._optimizer.add_param_group(param_group)
        self._show(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """What optimizer_class alone would return, as copies, on every rank."""
        assert self._optimizer is not None
        saved = copy.deepcopy(self._optimizer.state_dict())
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, saved["state"])
        saved["state"] = {number: state for share in shares for number, state in share.items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict returned here, in another world, or in optimizer_class.

        Args:
            state_dict: the same on every rank; it stays as it is.
        """
        assert self._optimizer is not None
        parameters = [p for group in self.param_groups for p in group["params"]]
        own = {n for n, p in enumerate(parameters) if self._owners.get(p) == dist.get_rank()}
        share = {number: state for number, state in state_dict["state"].items() if number in own}
        self._optimizer.load_state_dict(copy.deepcopy({**state_dict, "state": share}))
        self._show(self._optimizer)


# Given; no need to change.
def run_ranks(world_size: int, function: Callable[[int], T]) -> list[T]:
    """Calls function(rank) in threads that form one process group, as its default one.

    Args:
        world_size: how many ranks.
        function: what each rank does.

    Returns:
        What the ranks return, in rank order; the first error of a rank is raised.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    store, hook = dist.HashStore(), sys.excepthook

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", store=store, rank=rank, world_size=world_size)
            results[rank] = function(rank)
        except BaseException as error:
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)  # the other ranks stop waiting
        finally:
            dist.destroy_process_group()

    c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]
        sys.excepthook = hook
    if errors:
        raise errors[0]
    if len(results) < world_size:
        raise TimeoutError(f"of {world_size} ranks {sorted(results)} have ended; the others wait")
    return [results[rank] for rank in range(world_size)]


class _TwoLayers(nn.Module):
    """Two layers, of which not every backward reaches the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        """[n, 3] -> losses [n]."""
        output = self.first(x) + self.second(x) if both else self.first(x)
        return (output - 1).square().sum(1)


def test_data_parallel() -> None:
    """Your own test of this file: passes on right code, fails on each slip listed above."""
    torch.manual_seed(0)
    rows = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 1)]
    replicas = [_TwoLayers().double() for _ in rows]
    alone = copy.deepcopy(replicas[0])

    def train(rank: int) -> dict[str, Any]:
        model = DataParallel(replicas[rank])
        optimizer = ShardedOptimizer(replicas[rank].parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            with model.no_sync():
                global_mean(model(rows[rank], both=False)).backward()
            global_mean(model(rows[rank], both=rank == 1)).backward()  # rank 0 lacks the second layer's gradient
            model.finish()
            optimizer.step()
            scheduler.step()
        return optimizer.state_dict()

    saved = run_ranks(2, train)

    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        for ends in ((False, False), (False, True)):
            losses = [alone(x, both) for x, both in zip(rows, ends, strict=True)]
            torch.cat(losses).mean().backward()
        optimizer.step()
        scheduler.step()
    for rank, replica in enumerate(replicas):
        torch.testing.assert_close(list(replica.parameters()), list(alone.parameters()))
        torch.testing.assert_close(saved[rank]["state"], optimizer.state_dict()["state"])
