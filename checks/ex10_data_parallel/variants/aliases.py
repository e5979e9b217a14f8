"""The start goes as objects, averages go into .grad as it lies; an optimizer over aliases, a broadcast per rank."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DataParallel(nn.Module):
    """Each parameter is a bit of its bucket's number."""

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25.0) -> None:
        super().__init__()
        self.module = module
        mine = [t.detach() for t in (*module.parameters(), *module.buffers())]
        sent: list[Any] = [mine]
        dist.broadcast_object_list(sent, src=0)
        for own, given in zip(mine, sent[0], strict=True):
            own.copy_(given)
        self.quiet = 0
        self.groups: list[list[nn.Parameter]] = [[]]
        left = room = bucket_cap_mb * 1048576
        for p in [p for p in module.parameters() if p.requires_grad][::-1]:
            if self.groups[-1] and (p.nbytes > left or p.dtype is not self.groups[-1][0].dtype):
                self.groups.append([])
                left = room
            left -= p.nbytes
            p.register_post_accumulate_grad_hook(self.hook(len(self.groups) - 1, 1 << len(self.groups[-1])))
            self.groups[-1].append(p)
        self.groups = [group for group in self.groups if group]
        self.begin()

    def begin(self) -> None:
        """All bits are open."""
        self.bits = [(1 << len(group)) - 1 for group in self.groups]
        self.sent: list[tuple[list[nn.Parameter], Tensor, Any]] = []

    def hook(self, place: int, bit: int) -> Callable[[Tensor], None]:
        """Closes a bit."""

        def close(_: Tensor) -> None:
            if not self.quiet:
                self.bits[place] &= ~bit
                self.send(self.bits)

        return close

    @torch.no_grad()
    def send(self, bits: list[int]) -> None:
        """Starts what is due."""
        scale = 1 / dist.get_world_size()
        while len(self.sent) < len(self.groups) and not bits[len(self.sent)]:
            group = self.groups[len(self.sent)]
            flat = group[0].new_zeros(sum(p.numel() for p in group) + len(group))
            for piece, p in zip(flat.split([p.numel() for p in group] + [1] * len(group)), group, strict=False):
                if p.grad is not None:
                    torch.mul(p.grad.reshape(-1), scale, out=piece)
            for n, p in enumerate(group, len(flat) - len(group)):
                flat[n] = p.grad is not None
            self.sent.append((group, flat, dist.all_reduce(flat, group=dist.group.WORLD, async_op=True)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Passes on."""
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """A stack that is one deeper from its start to its end."""
        parallel = self

        class Deeper(ExitStack):
            def __enter__(self) -> Any:
                parallel.quiet += 1
                self.callback(lambda: setattr(parallel, "quiet", parallel.quiet - 1))
                return super().__enter__()

        return Deeper()  # type: ignore[return-value]

    def finish(self) -> None:
        """Waits for the last one first."""
        self.send([0] * len(self.groups))
        for group, flat, work in self.sent[::-1]:
            work.wait()
            *pieces, there = flat.split([*(p.numel() for p in group), len(group)])
            for p, values, one in zip(group, pieces, there.tolist(), strict=True):
                if one:
                    p.grad = torch.empty_like(p) if p.grad is None else p.grad
                    p.grad.copy_(values.view(p.shape))
        self.begin()


def global_mean(losses: Tensor) -> Tensor:
    """Gathers the counts."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(losses)]))
    return losses.sum() / (sum(map(int, counts)) / len(counts))


class ShardedOptimizer(torch.optim.Optimizer):
    """The inner optimizer knows other parameters, which share the memory of the share's."""

    def __init__(
        self, params: Iterable[Any], optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **defaults: Any
    ) -> None:
        self.inner = optimizer_class([{"params": []}], **defaults)
        self.inner.param_groups.clear()
        self.shares: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
        self.alias: dict[Tensor, nn.Parameter] = {}
        super().__init__(params, self.inner.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Deals out the largest first."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in sorted((p for p in group["params"] if p.requires_grad), key=lambda p: p.nbytes, reverse=True):
            least = min(self.shares, key=lambda share: sum(q.nbytes for q in share))
            least.append(p)
            if least is self.shares[dist.get_rank()]:
                self.alias[p] = nn.Parameter(p.detach())
        aliases = [self.alias[p] for p in group["params"] if p in self.alias]
        self.inner.add_param_group({**group, "params": aliases})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Aliases are shown where parameters are now, and their gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({k: v for k, v in outer.items() if k != "params"})
        for p, alias in self.alias.items():
            alias.data, alias.grad = p.data, p.grad
        self.inner.step()
        for alias in self.alias.values():
            alias.grad = None
        for source, share in enumerate(self.shares):
            kinds = defaultdict(list)
            for p in share:
                kinds[p.dtype].append(p)
            for kind in kinds.values():
                flat = torch.cat([p.reshape(-1) for p in kind])
                dist.broadcast(flat, source)
                for p, values in zip(kind, flat.split([p.numel() for p in kind]), strict=True):
                    p.copy_(values.view(p.shape))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Groups are the outer ones, states the inner one's."""
        saved: dict[str, Any] = copy.deepcopy(super().state_dict())
        every = [p for group in self.param_groups for p in group["params"]]
        states = [self.inner.state.get(self.alias[p]) if p in self.alias else None for p in every]
        parts: list[Any] = [None] * len(self.shares)
        dist.all_gather_object(parts, states)
        for number, came in enumerate(zip(*parts, strict=True)):
            for state in filter(None, came):
                saved["state"][number] = state
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Groups here, states there."""
        super().load_state_dict({"state": {}, "param_groups": copy.deepcopy(state_dict["param_groups"])})
        self.inner.state.clear()
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p in self.alias and number in state_dict["state"]:
                self.inner.state[self.alias[p]] = copy.deepcopy(state_dict["state"][number])
