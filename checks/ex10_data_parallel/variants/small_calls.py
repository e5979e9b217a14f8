"""Counts instead of sets, flags of a half; groups lose the others' parameters for the step; bytes in one gather."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DataParallel(nn.Module):
    """Queues what is ready."""

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25.0) -> None:
        super().__init__()
        self.module = module
        self.world = dist.get_world_size()
        with torch.no_grad():
            for value in itertools.chain(module.buffers(), module.parameters()):
                row = value.reshape(-1).clone()
                output = torch.empty(row.numel() * self.world, dtype=row.dtype)
                dist.all_gather_single(output, row)
                value.copy_(output[: row.numel()].view(value.shape))
        limit = int(bucket_cap_mb * 2**20)
        self.buckets: list[list[nn.Parameter]] = []
        for p in reversed([p for p in module.parameters() if p.requires_grad]):
            last = self.buckets[-1] if self.buckets else []
            if last and last[0].dtype == p.dtype and sum(q.nbytes for q in last) + p.nbytes <= limit:
                last.append(p)
            else:
                self.buckets.append([p])
        self.enabled = True
        self.pending: list[tuple[Any, Tensor]] = []
        self.seen: dict[int, int] = {}
        for number, bucket in enumerate(self.buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(lambda _, number=number: self.count(number))

    def count(self, number: int) -> None:
        """Counts."""
        if self.enabled:
            self.seen[number] = self.seen.get(number, 0) + 1
            while self.buckets[len(self.pending) :] and self.seen.get(len(self.pending), 0) == len(
                self.buckets[len(self.pending)]
            ):
                self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Starts the next one."""
        bucket = self.buckets[len(self.pending)]
        flat = torch.zeros(sum(p.numel() + 1 for p in bucket), dtype=bucket[0].dtype)
        flags = flat[flat.numel() - len(bucket) :]
        place = 0
        for n, p in enumerate(bucket):
            if p.grad is not None:
                flat[place : place + p.numel()] = p.grad.flatten()
                flags[n] = 0.5
            place += p.numel()
        flat[: flat.numel() - len(bucket)] /= self.world
        self.pending.append((dist.all_reduce(flat, async_op=True), flat))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Passes on."""
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """A generator made a context."""

        def quiet() -> Iterator[None]:
            saved, self.enabled = self.enabled, False
            try:
                yield
            finally:
                self.enabled = saved

        return contextmanager(quiet)()

    def finish(self) -> None:
        """Ends."""
        while self.buckets[len(self.pending) :]:
            self.start()
        for bucket, (work, flat) in zip(self.buckets, self.pending, strict=True):
            work.wait()
            sizes = [p.numel() for p in bucket] + [1] * len(bucket)
            parts = flat.split(sizes)
            for p, part, flag in zip(bucket, parts, parts[len(bucket) :], strict=False):
                if flag.any():
                    p.grad = torch.empty_like(p).copy_(part.view_as(p)).detach()
        self.pending, self.seen = [], {}


class ShardedOptimizer(torch.optim.Optimizer):
    """Sends whole parameters as bytes, in one gather."""

    def __init__(
        self, params: Iterable[Any], optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **defaults: Any
    ) -> None:
        self.ready = False
        self.base = optimizer_class(params, **defaults)
        super().__init__([{"params": [torch.zeros(1)]}], self.base.defaults)
        self.ready = True
        self.param_groups = self.base.param_groups
        self.owner: dict[int, int] = {}
        self.deal()

    def deal(self) -> None:
        """Who steps what."""
        load = [0] * dist.get_world_size()
        for p in self.every():
            rank = self.owner.setdefault(id(p), load.index(min(load)))
            load[rank] += p.nbytes

    def every(self) -> list[Tensor]:
        """The trainable parameters."""
        return [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more."""
        if not self.ready:
            return super().add_param_group(param_group)
        self.base.add_param_group(param_group)
        self.deal()

    def share(self, rank: int) -> list[Tensor]:
        """What a rank steps."""
        return [p for p in self.every() if self.owner[id(p)] == rank]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Groups lose the others' parameters for the time of the step."""
        loss = None if closure is None else closure()
        mine = {id(p) for p in self.share(dist.get_rank())}
        full = [group["params"] for group in self.base.param_groups]
        try:
            for group in self.base.param_groups:
                group["params"] = [p for p in group["params"] if id(p) in mine]
            self.base.step()
        finally:
            for group, params in zip(self.base.param_groups, full, strict=True):
                group["params"] = params
        world = dist.get_world_size()
        length = max(sum(p.nbytes for p in self.share(rank)) for rank in range(world))
        packet = torch.zeros(length, dtype=torch.uint8)
        pieces = [p.detach().contiguous().flatten().view(torch.uint8) for p in self.share(dist.get_rank())]
        if pieces:
            torch.cat(pieces, out=packet[: sum(piece.numel() for piece in pieces)])
        packets = [torch.empty_like(packet) for _ in range(world)]
        dist.all_gather(packets, packet)
        for rank, got in enumerate(packets):
            place = 0
            for p in self.share(rank):
                piece = got[place : place + p.nbytes].clone().view(p.dtype).view(p.shape)
                p.data.copy_(piece)
                place += p.nbytes
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Whole, everywhere."""
        saved = self.base.state_dict()
        box: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(box, saved["state"])
        state = {n: s for n, s in sorted(itertools.chain.from_iterable(part.items() for part in box))}
        return copy.deepcopy({"state": state, "param_groups": saved["param_groups"]})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A share of it."""
        listed = [p for group in self.base.param_groups for p in group["params"]]
        given = copy.deepcopy(state_dict)
        for n in list(given["state"]):
            if self.owner.get(id(listed[n])) != dist.get_rank():
                del given["state"][n]
        self.base.load_state_dict(given)
        self.param_groups = self.base.param_groups
