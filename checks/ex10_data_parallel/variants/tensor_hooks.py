"""Hooks on tensors, before autograd accumulates; a flat padded gather of whole parameters, one for each dtype."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DataParallel(nn.Module):
    """Adds what comes to what is there by itself."""

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25.0) -> None:
        super().__init__()
        self.module = module
        every = [*module.parameters(), *module.buffers()]
        sent = [value.detach().contiguous().reshape(-1).view(torch.uint8).clone() for value in every]
        for work in [dist.broadcast(one, 0, async_op=True) for one in sent]:
            work.wait()
        with torch.no_grad():
            for value, one in zip(every, sent, strict=True):
                value.copy_(one.view(value.dtype).view(value.shape))
        self.groups: list[list[nn.Parameter]] = []
        room = 0.0
        for p in list(module.parameters())[::-1]:
            if p.requires_grad:
                if not self.groups or p.nbytes > room or self.groups[-1][0].dtype is not p.dtype:
                    self.groups.append([])
                    room = bucket_cap_mb * (1 << 20)
                self.groups[-1].append(p)
                room -= p.nbytes
        self.loud = True
        self.fresh: dict[Tensor, Tensor] = {}
        self.flights: list[tuple[Tensor, Any]] = []
        for group in self.groups:
            for p in group:
                p.register_hook(lambda grad, p=p: self.comes(p, grad))

    def comes(self, p: Tensor, grad: Tensor) -> None:
        """A gradient comes, and is not in .grad yet."""
        if self.loud:
            self.fresh[p] = grad.detach() if p.grad is None else p.grad + grad.detach()
            for group in self.groups[len(self.flights) :]:
                if not all(q in self.fresh for q in group):
                    break
                self.take_off(group)

    def take_off(self, group: list[nn.Parameter]) -> None:
        """Sends a bucket."""
        flat = torch.empty(sum(p.numel() for p in group) + len(group), dtype=group[0].dtype)
        at = 0
        for n, p in enumerate(group):
            value = self.fresh.get(p, p.grad)
            flat[at : at + p.numel()] = 0 if value is None else value.detach().reshape(-1) / dist.get_world_size()
            at += p.numel()
            flat[n - len(group)] = value is not None
        self.flights.append((flat, dist.all_reduce(flat, async_op=True)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Passes on."""
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """Quiet until the outermost ends."""

        @contextlib.contextmanager
        def quiet() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                stack.callback(setattr, self, "loud", self.loud)
                self.loud = False
                yield

        return quiet()

    def finish(self) -> None:
        """Lands."""
        for group in self.groups[len(self.flights) :]:
            self.take_off(group)
        for group, (flat, flight) in zip(self.groups, self.flights, strict=True):
            flight.wait()
            for p, part, flag in zip(
                group, flat.split([p.numel() for p in group] + [len(group)]), flat[-len(group) :], strict=False
            ):
                if flag != 0:
                    p.grad = part.clone().view_as(p)
        self.fresh, self.flights = {}, []


def global_mean(losses: Tensor) -> Tensor:
    """By a gathered count."""
    count = torch.tensor([losses.numel()], dtype=torch.int64)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    share = losses.numel() / int(torch.cat(counts).sum()) * dist.get_world_size()
    return losses.mean() * share if losses.numel() else losses.sum()


class ShardedOptimizer(torch.optim.Optimizer):
    """Whole parameters, the largest dealt first where they come together; one inner optimizer over the share."""

    def __init__(
        self, params: Iterable[Any], optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **defaults: Any
    ) -> None:
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.shares: list[list[Tensor]] = [[] for _ in range(self.world)]
        template = optimizer_class(params, **defaults)
        self.local = optimizer_class([torch.zeros(0)], **defaults)
        self.local.param_groups = []
        super().__init__(template.param_groups, template.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Deals, the largest first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in sorted((p for p in group["params"] if p.requires_grad), key=lambda p: -p.nbytes):
            min(self.shares, key=lambda share: sum(q.nbytes for q in share)).append(p)
        mine = {id(p) for p in self.shares[self.rank]}
        self.local.param_groups.append({**group, "params": [p for p in group["params"] if id(p) in mine]})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps the share; a gather for each dtype brings the others'."""
        value = None if closure is None else closure()
        for ours, theirs in zip(self.param_groups, self.local.param_groups, strict=True):
            for key in ours:
                if key != "params":
                    theirs[key] = ours[key]
        self.local.step()
        with torch.no_grad():
            for dtype in sorted({p.dtype for share in self.shares for p in share}, key=str):
                shares = [[p for p in share if p.dtype == dtype] for share in self.shares]
                length = max(sum(p.numel() for p in share) for share in shares)
                flat = torch.zeros(length, dtype=dtype)
                if shares[self.rank]:
                    packed = torch.cat([p.reshape(-1) for p in shares[self.rank]])
                    flat[: packed.numel()] = packed
                everything = [torch.empty_like(flat) for _ in range(self.world)]
                dist.all_gather(everything, flat)
                for share, got in zip(shares, everything, strict=True):
                    for p, part in zip(
                        share,
                        got.split([*(p.numel() for p in share), length - sum(p.numel() for p in share)]),
                        strict=False,
                    ):
                        p.copy_(part.view(p.shape))
        return value

    def state_dict(self) -> dict[str, Any]:
        """Each rank in turn tells its share."""
        order = [p for group in self.param_groups for p in group["params"]]
        state: dict[int, Any] = {}
        for source in range(self.world):
            box: list[Any] = [None]
            if source == self.rank:
                box = [{n: self.local.state[p] for n, p in enumerate(order) if p in self.local.state}]
            dist.broadcast_object_list(box, src=source)
            state |= box[0]
        state = copy.deepcopy(state)
        groups, count = [], 0
        for group in self.param_groups:
            numbers = list(range(count, count + len(group["params"])))
            count += len(numbers)
            groups.append(copy.deepcopy({k: v for k, v in group.items() if k != "params"}) | {"params": numbers})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Over what was there."""
        loaded = state_dict["param_groups"]
        for group, new in zip(self.param_groups, loaded, strict=True):
            group.update(copy.deepcopy({k: v for k, v in new.items() if k != "params"}))
        order = [p for group in self.param_groups for p in group["params"]]
        mine = {id(p) for p in self.shares[self.rank]}
        self.local.state.clear()
        for n, state in state_dict["state"].items():
            if id(order[n]) in mine:
                self.local.state[order[n]] = copy.deepcopy(state)
