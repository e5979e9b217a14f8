"""Hooks on autograd's accumulating nodes; optimizer_class is made anew at each step, over the share alone."""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DataParallel(nn.Module):
    """Keeps the nodes, and knows buckets by name."""

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25.0) -> None:
        super().__init__()
        self.module = module
        for value in dict.fromkeys([*module.buffers(), *module.parameters()]):
            parts = [
                torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
            ]
            dist.all_gather(parts, value.detach().contiguous())
            with torch.no_grad():
                value.copy_(parts[0])
        self.plan: dict[int, list[nn.Parameter]] = {}
        used = 0.0
        for p in reversed(list(module.parameters())):
            if not p.requires_grad:
                continue
            last = self.plan.get(len(self.plan) - 1, [])
            if not last or last[0].dtype != p.dtype or used + p.nbytes > bucket_cap_mb * 2**20:
                last = self.plan.setdefault(len(self.plan), [])
                used = 0.0
            last.append(p)
            used += p.nbytes
        self.muted = 0
        self.todo = {n: len(bucket) for n, bucket in self.plan.items()}
        self.sent: dict[int, tuple[Tensor, Any]] = {}
        self.nodes = []
        for n, bucket in self.plan.items():
            for p in bucket:
                view = p.expand_as(p)
                assert view.grad_fn is not None
                node: Any = view.grad_fn.next_functions[0][0]
                node.register_hook(lambda *_, n=n: self.ready(n))
                self.nodes.append(node)

    def ready(self, number: int) -> None:
        """One more of a bucket is accumulated."""
        if self.muted:
            return
        self.todo[number] -= 1
        for n in range(len(self.sent), len(self.plan)):
            if self.todo[n] > 0:
                return
            self.send(n)

    def send(self, number: int) -> None:
        """Sends a bucket."""
        bucket = self.plan[number]
        with torch.no_grad():
            rows = [torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else p.grad.reshape(-1) for p in bucket]
            rows.append(torch.tensor([0.0 if p.grad is None else 1.0 for p in bucket], dtype=bucket[0].dtype))
            flat = torch.cat([row / dist.get_world_size() for row in rows])
        self.sent[number] = flat, dist.all_reduce(flat, op=dist.ReduceOp.SUM, async_op=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Passes on."""
        return self.module.__call__(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """Mutes."""
        outer = self

        class Muted:
            def __enter__(self) -> None:
                outer.muted += 1

            def __exit__(self, *_: object) -> None:
                outer.muted -= 1

        return Muted()

    def finish(self) -> None:
        """Sends the rest, waits from the last to the first."""
        for n in range(len(self.sent), len(self.plan)):
            self.send(n)
        for n in reversed(range(len(self.plan))):
            flat, work = self.sent.pop(n)
            work.wait()
            place = 0
            for k, p in enumerate(self.plan[n]):
                if flat[k - len(self.plan[n])].item():
                    p.grad = flat[place : place + p.numel()].reshape(p.shape).clone()
                place += p.numel()
        self.todo = {n: len(bucket) for n, bucket in self.plan.items()}


def global_mean(losses: Tensor) -> Tensor:
    """Every row weighs the same."""
    total = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    total[dist.get_rank()] = losses.numel()
    dist.all_reduce(total)
    return torch.mul(losses, float(dist.get_world_size() / total.sum())).sum()


class ShardedOptimizer(torch.optim.Optimizer):
    """Makes optimizer_class anew at each step, over the share, and hands the state from one to the next."""

    def __init__(
        self, params: Iterable[Any], optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **defaults: Any
    ) -> None:
        self.kind, self.options = optimizer_class, defaults
        self.places: dict[int, int] = {}
        groups = optimizer_class(params, **defaults).param_groups
        super().__init__(groups, optimizer_class([torch.zeros(1)], **defaults).defaults)

    def everything(self) -> list[Tensor]:
        """All parameters, by number."""
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Gives each new parameter a place."""
        super().add_param_group(param_group)
        for n, p in enumerate(self.everything()):
            if n not in self.places and p.requires_grad:
                have = [0] * dist.get_world_size()
                for m, rank in self.places.items():
                    have[rank] += self.everything()[m].nbytes
                self.places[n] = have.index(min(have))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """An optimizer for this step alone."""
        result = closure() if closure else None
        mine = {id(self.everything()[n]) for n, rank in self.places.items() if rank == dist.get_rank()}
        groups = [{**group, "params": [p for p in group["params"] if id(p) in mine]} for group in self.param_groups]
        groups = [group for group in groups if group["params"]]
        if groups:
            once = self.kind(groups, **self.options)
            once.state = self.state
            once.step()
        with torch.no_grad():
            for n, rank in self.places.items():
                p = self.everything()[n]
                moved = torch.empty(p.shape, dtype=p.dtype) if rank != dist.get_rank() else p.clone().contiguous()
                moved = moved.contiguous()
                dist.broadcast(moved, src=rank)
                p.copy_(moved)
        return result

    def state_dict(self) -> dict[str, Any]:
        """As the base class saves, with the others' states."""
        mine = super().state_dict()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine["state"])
        whole: dict[int, Any] = {}
        for part in parts:
            whole.update(part)
        return {"state": whole, "param_groups": copy.deepcopy(mine["param_groups"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class loads, without the others' states."""
        share = {n: s for n, s in state_dict["state"].items() if self.places.get(n) == dist.get_rank()}
        super().load_state_dict(copy.deepcopy({"state": share, "param_groups": state_dict["param_groups"]}))
