"""Every .grad is a view of its bucket; the optimizer shards elements and exchanges them by padded gathers."""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DataParallel(nn.Module):
    """Buckets hold the gradients themselves."""

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25.0) -> None:
        super().__init__()
        self.module = module
        for value in [*module.parameters(), *module.buffers()]:
            parcel = [value.detach().clone()]
            dist.broadcast_object_list(parcel, src=0)
            value.data.copy_(parcel[0])
        self.parts: list[dict[nn.Parameter, Tensor]] = []
        self.flats: list[Tensor] = []
        group: list[nn.Parameter] = []
        for p in [*reversed([p for p in module.parameters() if p.requires_grad]), None]:
            full = group and p is not None and sum(q.nbytes for q in [*group, p]) > bucket_cap_mb * 2**20
            if group and (p is None or full or p.dtype != group[0].dtype):
                flat = group[0].new_zeros(sum(q.numel() for q in group) + len(group)).detach()
                pieces = flat.split([*(q.numel() for q in group), len(group)])
                self.flats.append(flat)
                self.parts.append({q: piece.view(q.shape) for q, piece in zip(group, pieces, strict=False)})
                group = []
            if p is not None:
                group.append(p)
        self.silent: list[object] = []
        self.arrived: set[Tensor] = set()
        self.works: list[Any] = []
        for part in self.parts:
            for p in part:
                p.register_post_accumulate_grad_hook(self.note)

    def note(self, p: Tensor) -> None:
        """A gradient is there."""
        if self.silent:
            return
        self.arrived.add(p)
        while len(self.works) < len(self.parts) and self.arrived.issuperset(self.parts[len(self.works)]):
            self.launch()

    def launch(self) -> None:
        """Moves gradients into the bucket and sends it."""
        part, flat = self.parts[len(self.works)], self.flats[len(self.works)]
        flags = flat[flat.numel() - len(part) :]
        for n, (p, view) in enumerate(part.items()):
            flags[n] = float(p.grad is not None)
            if p.grad is None:
                view.zero_()
            elif p.grad.data_ptr() != view.data_ptr() or p.grad.stride() != view.stride():
                view.copy_(p.grad)
                p.grad = view
        flat.mul_(1.0 / dist.get_world_size()) if dist.get_world_size() in (1, 2, 4) else flat.div_(
            dist.get_world_size()
        )
        self.works.append(dist.all_reduce(flat, async_op=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Passes on."""
        return self.module.forward(*args, **kwargs) if not args and not kwargs else self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """A stack that pushes a mark when it is entered."""
        owner = self

        class Silence(ExitStack):
            def __enter__(self) -> Any:
                owner.silent.append(self)
                self.callback(owner.silent.pop)
                return super().__enter__()

        return Silence()

    def finish(self) -> None:
        """Waits for the views."""
        while len(self.works) < len(self.parts):
            self.launch()
        for part, flat, work in zip(self.parts, self.flats, self.works, strict=True):
            work.wait()
            for (p, view), flag in zip(part.items(), flat[flat.numel() - len(part) :], strict=True):
                p.grad = view if flag > 0 else None
        self.works.clear()
        self.arrived.clear()


class ShardedOptimizer(torch.optim.Optimizer):
    """Each rank owns a run of elements of every parameter."""

    def __init__(
        self, params: Iterable[Any], optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **defaults: Any
    ) -> None:
        self.shards: dict[Tensor, Tensor] = {}
        self.inner: torch.optim.Optimizer | None = None
        first = optimizer_class(list(params), **defaults)
        self.inner = optimizer_class([{"params": []}], **defaults)
        self.inner.param_groups.clear()
        super().__init__(first.param_groups, first.defaults)

    def run(self, p: Tensor) -> slice:
        """The elements of a parameter that are this rank's."""
        length = -(-p.numel() // dist.get_world_size())
        return slice(min(p.numel(), dist.get_rank() * length), min(p.numel(), (dist.get_rank() + 1) * length))

    def piece(self, p: Tensor) -> Tensor:
        """Those elements."""
        return p.detach().reshape(-1)[self.run(p)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Cuts its parameters."""
        count = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[count]
        pieces = []
        for p in group["params"]:
            self.shards[p] = nn.Parameter(self.piece(p), requires_grad=p.requires_grad)
            pieces.append(self.shards[p])
        assert self.inner is not None
        self.inner.add_param_group({**group, "params": pieces})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps the elements, then gathers them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self.inner is not None
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs.update({k: v for k, v in ours.items() if k != "params"})
        for p, shard in self.shards.items():
            shard.data = self.piece(p)
            shard.grad = None if p.grad is None else self.piece(p.grad)
        self.inner.step()
        for p, shard in self.shards.items():
            shard.grad = None
            if not p.requires_grad:
                continue
            length = -(-p.numel() // dist.get_world_size())
            padded = shard.new_zeros(length)
            padded[: shard.numel()] = shard
            whole = padded.new_empty(length * dist.get_world_size())
            dist.all_gather_single(whole, padded)
            p.copy_(whole[: p.numel()].view(p.shape))
        for shard in self.shards.values():  # Of a parameter that is not contiguous it would be a copy.
            shard.data = shard.new_empty(0)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Puts the elements of all ranks together."""
        assert self.inner is not None
        own = [dict(self.inner.state.get(shard, {})) for shard in self.shards.values()]
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        state: dict[int, Any] = {}
        for n, p in enumerate(self.shards):
            if not ranks[0][n]:
                continue
            state[n] = {}
            for key, value in ranks[0][n].items():
                parts = [one[n][key] for one in ranks]
                state[n][key] = value if key == "step" else torch.cat(parts).view(p.shape)
        numbers = {p: n for n, p in enumerate(self.shards)}
        groups = [{**group, "params": [numbers[p] for p in group["params"]]} for group in self.param_groups]
        return copy.deepcopy({"state": state, "param_groups": groups})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Cuts the elements out."""
        assert self.inner is not None
        given = copy.deepcopy(state_dict["param_groups"])
        for group, new in zip(self.param_groups, given, strict=True):
            group.update({k: v for k, v in new.items() if k != "params"})
        self.inner.state.clear()
        for n, (p, shard) in enumerate(self.shards.items()):
            for key, value in state_dict["state"].get(n, {}).items():
                cut = value.clone() if key == "step" else value.detach().reshape(-1)[self.run(p)].clone()
                self.inner.state[shard][key] = cut
