"""Flat buffers made once, and one more all_reduce that tells which gradients are there; an optimizer per parameter."""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Quiet:
    """Counts how deep it is entered."""

    def __init__(self, owner: "DataParallel") -> None:
        self.owner = owner

    def __enter__(self) -> None:
        self.owner.depth += 1

    def __exit__(self, *_: object) -> None:
        self.owner.depth -= 1


class DataParallel(nn.Module):
    """Parameters by number, buckets as ranges of them."""

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25.0) -> None:
        super().__init__()
        self.module = module
        self.depth = 0
        with torch.no_grad():
            for value in module.state_dict(keep_vars=True).values():
                self._from_rank_0(value)
            for value in module.buffers():
                self._from_rank_0(value)
        self.trained = [p for p in module.parameters() if p.requires_grad][::-1]
        self.bucket_of: list[int] = []
        sizes: list[int] = []
        for n, p in enumerate(self.trained):
            nbytes = p.numel() * p.element_size()
            if not n or self.trained[n - 1].dtype != p.dtype or sizes[-1] + nbytes > bucket_cap_mb * 1024 * 1024:
                sizes.append(0)
            sizes[-1] += nbytes
            self.bucket_of.append(len(sizes) - 1)
        self.flats: list[Tensor] = []
        for b in range(len(sizes)):
            members = [p for p, at in zip(self.trained, self.bucket_of, strict=True) if at == b]
            self.flats.append(torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype))
        self.open = [self.bucket_of.count(b) for b in range(len(sizes))]
        self.works: list[Any] = []
        for p, b in zip(self.trained, self.bucket_of, strict=True):
            p.register_post_accumulate_grad_hook(self._hook(b))

    @staticmethod
    def _from_rank_0(value: Tensor) -> None:
        arriving = value.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(arriving, src=0)
        value.copy_(arriving)

    def _hook(self, bucket: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self.depth == 0:
                self.open[bucket] -= 1
                while len(self.works) < len(self.flats) and self.open[len(self.works)] == 0:
                    self._send()

        return hook

    def _send(self) -> None:
        b, offset, world = len(self.works), 0, dist.get_world_size()
        flat = self.flats[b]
        for p, at in zip(self.trained, self.bucket_of, strict=True):
            if at == b:
                place = flat[offset : offset + p.numel()]
                place.zero_() if p.grad is None else torch.div(p.grad.reshape(-1), world, out=place)
                offset += p.numel()
        self.works.append(dist.all_reduce(flat, op=dist.ReduceOp.SUM, async_op=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Passes on."""
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """Goes one deeper."""
        return _Quiet(self)

    def finish(self) -> None:
        """Asks who has what, then waits."""
        if not self.trained:
            return
        there = torch.tensor([p.grad is not None for p in self.trained], dtype=torch.int64)
        while len(self.works) < len(self.flats):
            self._send()
        dist.all_reduce(there, op=dist.ReduceOp.MAX)
        for work in self.works:
            work.wait()
        offsets = [0] * len(self.flats)
        for p, b, one in zip(self.trained, self.bucket_of, there.tolist(), strict=True):
            piece = self.flats[b][offsets[b] : offsets[b] + p.numel()].view_as(p)
            offsets[b] += p.numel()
            if one and p.grad is None:
                p.grad = piece.clone()
            elif one:
                p.grad.copy_(piece)  # type: ignore[union-attr]
        self.works, self.open = [], [self.bucket_of.count(b) for b in range(len(self.flats))]


def global_mean(losses: Tensor) -> Tensor:
    """Counts by objects."""
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, losses.shape[0])
    return losses.sum() * len(counts) / sum(counts)


class ShardedOptimizer(torch.optim.Optimizer):
    """Each parameter of the share has an optimizer to itself, made anew whenever its options are needed."""

    def __init__(
        self, params: Iterable[Any], optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **defaults: Any
    ) -> None:
        self.make, self.given = optimizer_class, defaults
        self.own: dict[Tensor, torch.optim.Optimizer] = {}
        self.turns: list[tuple[Tensor, int]] = []
        listed = list(params)
        pattern = optimizer_class(listed, **defaults)
        super().__init__(pattern.param_groups, pattern.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Deals out its parameters."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        for p in self.param_groups[before]["params"]:
            if p.requires_grad:
                loads = [sum(q.nbytes for q, r in self.turns if r == rank) for rank in range(dist.get_world_size())]
                self.turns.append((p, min(range(len(loads)), key=loads.__getitem__)))
                if self.turns[-1][1] == dist.get_rank():
                    self.own[p] = self.make([p], **self.given)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps one by one; all broadcasts run at once."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.own:
                    self.own[p].param_groups[0].update({k: v for k, v in group.items() if k != "params"})
                    self.own[p].step()
        running = []
        with torch.no_grad():
            for p, source in self.turns:
                buffer = p.data.contiguous()
                running.append((p, buffer, dist.broadcast(buffer, source, async_op=True)))
            for p, buffer, work in running:
                work.wait()
                p.copy_(buffer)
        return loss

    def _numbers(self) -> dict[Tensor, int]:
        return {p: n for n, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def state_dict(self) -> dict[str, Any]:
        """Gathers numbered states."""
        numbers = self._numbers()
        mine = {numbers[p]: one.state[p] for p, one in self.own.items() if one.state.get(p)}
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
        groups = []
        for group in self.param_groups:
            plain = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            groups.append({**plain, "params": [numbers[p] for p in group["params"]]})
        return {"state": dict(sorted(pair for share in shares for pair in share.items())), "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what belongs to the share."""
        numbers = self._numbers()
        for group, given in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: copy.deepcopy(v) for k, v in given.items() if k != "params"})
        for p, one in self.own.items():
            one.state.clear()
            if numbers[p] in state_dict["state"]:
                one.state[p] = copy.deepcopy(state_dict["state"][numbers[p]])
