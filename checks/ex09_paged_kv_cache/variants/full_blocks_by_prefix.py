"""Shares full blocks alone, by a dictionary of what precedes them; its calls have the youngest request first."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Engine:
    """Requests in one ordered dictionary."""

    def __init__(
        self,
        model: Any,
        num_blocks: int,
        block_size: int,
        max_batch_size: int = 8,
        eos_token_id: int | None = None,
    ) -> None:
        weight = next(model.parameters())
        self.cache = PagedKVCache(
            model.num_layers, num_blocks, block_size, model.num_kv_heads, model.head_dim, weight.dtype, weight.device
        )
        self.model, self.total, self.size, self.most, self.eos = (
            model,
            num_blocks,
            block_size,
            max_batch_size,
            eos_token_id,
        )
        self.asked: list[tuple[int, int]] = []  # tokens of the prompt, and new ones
        self.tokens: OrderedDict[int, list[int]] = OrderedDict()
        self.fed: dict[int, int] = {}  # of those that run
        self.answers: dict[int, list[int]] = {}
        self.numbers: Counter[str] = Counter()

    def submit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Checks and keeps a request."""
        if max_new_tokens <= 0:
            raise ValueError("nothing is asked for")
        if len(prompt) == 0 or min(prompt) < 0 or max(prompt) >= self.model.vocab_size:
            raise ValueError("no prompt, or tokens that are none")
        blocks = -(-(len(prompt) + max_new_tokens - 1) // self.size)
        if blocks > self.total:
            raise ValueError(f"{self.total} blocks are there, {blocks} would be needed")
        number = len(self.asked)
        self.asked.append((len(prompt), max_new_tokens))
        self.tokens[number] = [*prompt]
        return number

    def step(self) -> dict[int, int]:
        """Plans on numbers first, then calls."""
        with torch.inference_mode():
            for number in sorted(self.fed):
                while number in self.fed:
                    try:
                        self.cache.append(number, len(self.tokens[number]) - self.cache.length(number))
                        break
                    except OutOfBlocksError:
                        self.stop(max(self.fed))
                        self.numbers["preemptions"] += 1
            known = {
                tuple(self.tokens[number][:end]): number
                for number, fed in self.fed.items()
                for end in range(self.size, fed + 1, self.size)
            }
            for number in sorted(self.tokens.keys() - self.fed.keys()):
                if len(self.fed) >= self.most or not self.start(number, known):
                    break
            if not self.fed:
                return {}
            return self.call(sorted(self.fed, reverse=True))

    def start(self, number: int, known: dict[tuple[int, ...], int]) -> bool:
        """Admits one, if it fits."""
        tokens = self.tokens[number]
        shared = 0
        while shared + self.size < len(tokens) and tuple(tokens[: shared + self.size]) in known:
            shared += self.size
        if -(-(len(tokens) - shared) // self.size) > self.cache.allocator.num_free:
            return False
        if shared:
            self.cache.fork(known[tuple(tokens[:shared])], number, shared)
        self.cache.append(number, len(tokens) - shared)
        self.fed[number] = shared
        return True

    def call(self, running: list[int]) -> dict[int, int]:
        """Feeds those that run, and notes what came once it has come."""
        fresh = {number: self.tokens[number][self.fed[number] :] for number in running}
        tables = [self.cache.block_table(number) for number in running]
        wide = max(map(len, tables))
        device = self.cache.keys.device
        block_tables = torch.tensor([table + [2**40] * (wide - len(table)) for table in tables], device=device)
        context = torch.tensor([len(self.tokens[number]) for number in running], device=device)
        lens = [len(new) for new in fresh.values()]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for number, k_own, v_own in zip(running, k.split(lens), v.split(lens), strict=True):
                self.cache.write(layer, number, self.fed[number], k_own, v_own)
            pools = self.cache.keys[layer], self.cache.values[layer]
            return paged_attention(q, *pools, block_tables, context, torch.tensor(lens, device=device))

        places = [place for number in running for place in range(self.fed[number], len(self.tokens[number]))]
        given = [token for new in fresh.values() for token in new]
        logits = self.model(torch.tensor(given, device=device), torch.tensor(places, device=device), attend)
        result, row = {}, -1
        for number, count in zip(running, lens, strict=True):
            row += count
            result[number] = int(logits[row].argmax())
        self.numbers.update(model_calls=1, tokens_fed=len(given), tokens_generated=len(running))
        for number, token in result.items():
            self.fed[number] = len(self.tokens[number])
            self.tokens[number].append(token)
            prompt, most = self.asked[number]
            if token == self.eos or len(self.tokens[number]) == prompt + most:
                self.answers[number] = self.tokens.pop(number)[prompt:]
                self.stop(number)
        return result

    def stop(self, number: int) -> None:
        """Runs no more."""
        del self.fed[number]
        self.cache.free(number)

    def run(self) -> dict[int, list[int]]:
        """All steps."""
        while self.tokens:
            self.step()
        return {number: [*answer] for number, answer in sorted(self.answers.items(), reverse=True)}

    def cancel(self, request_id: int) -> bool:
        """Takes it away."""
        if request_id not in self.tokens:
            return False
        if request_id in self.fed:
            self.stop(request_id)
        del self.tokens[request_id]
        self.numbers["cancelled"] += 1
        return True

    def metrics(self) -> dict[str, int]:
        """More than is asked for."""
        names = ("cancelled", "preemptions", "model_calls", "tokens_fed", "tokens_generated")
        return {
            **{name: self.numbers[name] for name in names},
            "finished": len(self.answers),
            "running": len(self.fed),
            "waiting": len(self.tokens) - len(self.fed),
            "blocks_used": self.total - self.cache.allocator.num_free,
            "submitted": len(self.asked),
        }
