"""A step plans on plain lists and is noted once its call has returned; if that fails, all is as it was before."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class _State:
    """All that a step may change, but for the contents of slots."""

    waiting: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    fed: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    done: dict[int, list[int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class Engine:
    """Steps as transactions."""

    def __init__(
        self,
        model: Any,
        num_blocks: int,
        block_size: int,
        max_batch_size: int = 8,
        eos_token_id: int | None = None,
    ) -> None:
        first = next(iter(model.parameters()))
        self.model, self.blocks, self.block_size = model, num_blocks, block_size
        self.limit, self.eos = max_batch_size, eos_token_id
        self.cache = PagedKVCache(
            model.num_layers, num_blocks, block_size, model.num_kv_heads, model.head_dim, first.dtype, first.device
        )
        self.lengths: list[tuple[int, int]] = []
        self.state = _State()
        for name in ("cancelled", "preemptions", "model_calls", "tokens_fed", "tokens_generated"):
            self.state.counts[name] = 0

    def submit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Keeps a copy."""
        tokens = [int(token) for token in prompt]
        total = len(tokens) + max_new_tokens
        if not tokens or max_new_tokens < 1 or any(t not in range(self.model.vocab_size) for t in tokens):
            raise ValueError(f"not a request: {tokens}, {max_new_tokens}")
        if (total - 2) // self.block_size + 1 > self.blocks:
            raise ValueError(f"needs {(total - 2) // self.block_size + 1} of {self.blocks} blocks")
        number = len(self.lengths)
        self.lengths.append((len(tokens), total))
        self.state.tokens[number] = tokens
        self.state.waiting.append(number)
        return number

    def step(self) -> dict[int, int]:
        """All of it, or nothing."""
        saved = copy.deepcopy((self.state, vars(self.cache.allocator), self.cache._tables, self.cache._lengths))
        try:
            with torch.no_grad():
                return self._step(self.state)
        except BaseException:
            self.state, held, self.cache._tables, self.cache._lengths = saved
            vars(self.cache.allocator).update(held)
            raise

    def _step(self, s: _State) -> dict[int, int]:
        cache = self.cache
        for number in sorted(s.running):
            while number in s.running and s.fed[number] % self.block_size == 0 and not cache.allocator.num_free:
                youngest = max(s.running)
                s.running.remove(youngest)
                s.waiting.append(youngest)
                cache.free(youngest)
                s.counts["preemptions"] += 1
            if number in s.running:
                cache.append(number, 1)
        sources = list(s.running)
        for number in sorted(s.waiting):
            tokens = s.tokens[number]
            best, common = -1, 0
            for other in sources:
                count = 0
                while count < min(len(tokens) - 1, s.fed[other]) and tokens[count] == s.tokens[other][count]:
                    count += 1
                if count > common:
                    best, common = other, count
            common -= common % self.block_size * (number % 2)
            full = (len(tokens) - 1) // self.block_size + 1 - common // self.block_size
            if len(s.running) == self.limit or full > cache.allocator.num_free:
                break
            if common:
                cache.fork(best, number, common)
            cache.append(number, len(tokens) - common)
            s.fed[number] = common
            s.running.append(number)
        s.waiting = [number for number in s.waiting if number not in s.running]
        if not s.running:
            return {}
        new = {number: s.tokens[number][s.fed[number] :] for number in s.running}
        chosen = self._called(s, new)
        s.counts["model_calls"] += 1
        s.counts["tokens_fed"] += sum(map(len, new.values()))
        s.counts["tokens_generated"] += len(chosen)
        for number, token in chosen.items():
            s.fed[number] = len(s.tokens[number])
            s.tokens[number].append(token)
            prompt, total = self.lengths[number]
            if len(s.tokens[number]) == total or token == self.eos:
                s.done[number] = s.tokens[number][prompt:]
                s.running.remove(number)
                cache.free(number)
        return chosen

    def _called(self, s: _State, new: dict[int, list[int]]) -> dict[int, int]:
        counts = [len(tokens) for tokens in new.values()]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = []
            for number, *own in zip(new, q.split(counts), k.split(counts), v.split(counts), strict=True):
                self.cache.write(layer, number, s.fed[number], own[1], own[2])
                length = s.fed[number] + len(own[0])
                parts.append(
                    paged_attention(
                        own[0],
                        self.cache.keys[layer],
                        self.cache.values[layer],
                        torch.tensor([self.cache.block_table(number)], device=q.device),
                        torch.tensor([length], device=q.device),
                        torch.tensor([len(own[0])], device=q.device),
                    )
                )
            return torch.cat(parts)

        device = self.cache.keys.device
        tokens = torch.tensor([token for one in new.values() for token in one], device=device)
        positions = torch.cat([torch.arange(len(one), device=device) + s.fed[number] for number, one in new.items()])
        logits = self.model(tokens, positions, attend)
        return {number: int(part[-1].argmax()) for number, part in zip(new, logits.split(counts), strict=True)}

    def run(self) -> dict[int, list[int]]:
        """Until a step has nothing to do."""
        while self.step():
            pass
        return copy.deepcopy(self.state.done)

    def cancel(self, request_id: int) -> bool:
        """From one list or the other."""
        s = self.state
        if request_id in s.running:
            s.running.remove(request_id)
            self.cache.free(request_id)
        elif request_id in s.waiting:
            s.waiting.remove(request_id)
        else:
            return False
        s.counts["cancelled"] += 1
        return True

    def metrics(self) -> dict[str, int]:
        """A new dictionary."""
        s = self.state
        used = self.blocks - self.cache.allocator.num_free
        return {
            "running": len(s.running),
            "waiting": len(s.waiting),
            "finished": len(s.done),
            "blocks_used": used,
        } | s.counts
