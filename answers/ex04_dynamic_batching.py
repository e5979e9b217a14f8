"""The answer to ex04, Dynamic batching."""

import asyncio
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class QueueFullError(RuntimeError):
    """Given; no need to change. As many requests wait as may wait."""


class Model(Protocol):
    """Given; no need to change. What a batcher may ask of its model."""

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, do_sample: bool, pad_token_id: int
    ) -> Tensor:
        """Continues each row of int64 [B, W]: int64 [B, W + max_new_tokens]."""


@dataclass(eq=False)
class BatchRequest:
    """One caller's request; change it as you like.

    Args:
        request_id: the caller's own name for it; may repeat.
        input_tokens: int64 [1, L].
        max_length: how many new tokens are asked for.
        timestamp: when it came, in seconds of `time.monotonic`.
        future: gets the result, int64 [1, L + max_length], or the error.
    """

    request_id: str
    input_tokens: Tensor
    max_length: int
    timestamp: float = field(default_factory=time.monotonic)
    future: Future[Tensor] = field(default_factory=Future)


class DynamicBatcher:
    """Collects requests and runs them on a model in batches of similar length.

    Args:
        model: what generates; only its `generate` is used, one call at a time.
        max_batch_size: most requests in a batch.
        max_wait_time: seconds after which a batch that is not full goes, from its oldest request on.
        length_tolerance: width of a length bucket, in tokens.
        max_queue_size: most requests that may wait, of all buckets together; those that run do not count.
    """

    def __init__(
        self,
        model: Model,
        max_batch_size: int = 32,
        max_wait_time: float = 0.1,
        length_tolerance: int = 32,
        *,
        max_queue_size: int = 1024,
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_wait_time = max_wait_time
        self.length_tolerance = length_tolerance
        self.max_queue_size = max_queue_size
        self._waiting: list[BatchRequest] = []  # the oldest first
        self._closed = False
        self._changed = threading.Condition()  # guards the two above
        self._worker = threading.Thread(target=self._serve, daemon=True)
        self._worker.start()

    def get_length_bucket(self, seq_len: int) -> int:
        """The upper edge of the bucket that a prompt of `seq_len` tokens falls into.

        Args:
            seq_len: tokens of the prompt, at least 1.
        """
        return math.ceil(seq_len / self.length_tolerance) * self.length_tolerance

    async def add_request(self, request_id: str, input_tokens: Tensor, max_length: int) -> Tensor:
        """Queues a request, and returns its result once its batch is done.

        Args:
            request_id: the caller's own name for it; may repeat.
            input_tokens: int64 [1, L].
            max_length: how many new tokens are wanted, at least 1.

        Returns:
            int64 [1, L + max_length]: the prompt and the new tokens.

        Raises:
            ValueError: the request cannot be valid.
            QueueFullError: max_queue_size requests wait already.
            RuntimeError: the batcher is shut down.
            Exception: the error of the model, if it raised in this request's batch.
        """
        if input_tokens.dim() != 2 or input_tokens.size(0) != 1 or input_tokens.size(1) == 0:
            raise ValueError(f"input_tokens have shape {tuple(input_tokens.shape)}; [1, L] with L >= 1 is wanted")
        if input_tokens.dtype != torch.int64:
            raise ValueError(f"input_tokens are {input_tokens.dtype}; torch.int64 is wanted")
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; at least 1 is wanted")
        request = BatchRequest(request_id, input_tokens, max_length)
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is shut down")
            self._forget_cancelled()
            if len(self._waiting) >= self.max_queue_size:
                raise QueueFullError(f"{len(self._waiting)} requests wait already; no more may")
            self._waiting.append(request)
            self._changed.notify_all()
        return await asyncio.wrap_future(request.future)

    def shutdown(self) -> None:
        """Takes no more requests, serves all that wait, and returns when that is done, however often it is called."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join()

    def _serve(self) -> None:
        """Runs one batch after the other until the batcher is shut down and its queue served."""
        for batch in iter(self._next_batch, []):
            # From here on a caller who gives up cannot cancel the future, so that its result can be set.
            started = [request for request in batch if request.future.set_running_or_notify_cancel()]
            if started:
                self._run(started)

    def _next_batch(self) -> list[BatchRequest]:
        """Waits for a batch that may go, and takes it; nothing once all is served after shutdown."""
        with self._changed:
            while True:
                self._forget_cancelled()
                now = time.monotonic()
                for requests in self._by_bucket():
                    batch = requests[: self.max_batch_size]
                    full = len(batch) == self.max_batch_size
                    if full or now >= batch[0].timestamp + self.max_wait_time or self._closed:
                        self._waiting = [request for request in self._waiting if request not in batch]
                        return batch
                if self._closed:
                    return []
                # Nothing is due before the oldest request.
                due = self._waiting[0].timestamp + self.max_wait_time if self._waiting else None
                self._changed.wait(None if due is None else due - now)

    def _by_bucket(self) -> list[list[BatchRequest]]:
        """The waiting requests of each bucket; the bucket that holds the oldest comes first."""
        buckets: dict[int, list[BatchRequest]] = {}
        for request in self._waiting:
            buckets.setdefault(self.get_length_bucket(request.input_tokens.size(1)), []).append(request)
        return list(buckets.values())

    def _forget_cancelled(self) -> None:
        self._waiting = [request for request in self._waiting if not request.future.cancelled()]

    def _run(self, batch: list[BatchRequest]) -> None:
        """Hands each caller its result, or the error of the model."""
        try:
            results = self._generate(batch)
        except Exception as error:
            for request in batch:
                request.future.set_exception(error)
        else:
            for request, result in zip(batch, results, strict=True):
                request.future.set_result(result)

    def _generate(self, batch: list[BatchRequest]) -> list[Tensor]:
        """Each request's prompt and its new tokens, from one call of the model."""
        prompts = [request.input_tokens for request in batch]  # each [1, its own L]
        width = max(prompt.size(1) for prompt in prompts)
        pads = [width - prompt.size(1) for prompt in prompts]
        ids = [functional.pad(prompt, (n, 0)) for prompt, n in zip(prompts, pads, strict=True)]
        mask = [functional.pad(torch.ones_like(prompt), (n, 0)) for prompt, n in zip(prompts, pads, strict=True)]
        output = self.model.generate(
            input_ids=torch.cat(ids),  # [B, L]
            attention_mask=torch.cat(mask),  # [B, L]
            max_new_tokens=max(request.max_length for request in batch),
            do_sample=False,
            pad_token_id=0,
        )  # [B, L + max_new_tokens]
        return [
            output[row : row + 1, pads[row] : width + request.max_length]  # [1, its own L + max_length]
            for row, request in enumerate(batch)
        ]


async def test_dynamic_batcher() -> None:
    """Your own test of DynamicBatcher: passes on right code, fails on each slip listed above."""
    torch.manual_seed(0)
    decoder = Decoder()
    calls: list[tuple[int, int]] = []  # rows and width of each

    class Recorder:
        def generate(self, input_ids: Tensor, *rest: Any, **options: Any) -> Tensor:
            calls.append((input_ids.size(0), input_ids.size(1)))
            return decoder.generate(input_ids, *rest, **options)

    async def outcomes(batcher: DynamicBatcher, requests: list[tuple[Tensor, int]]) -> list[Tensor | BaseException]:
        tasks = [asyncio.ensure_future(batcher.add_request("same id", prompt, new)) for prompt, new in requests]
        await asyncio.sleep(0)  # Each task runs until it waits.
        batcher.shutdown()  # Nothing waits for a time limit here.
        return await asyncio.gather(*tasks, return_exceptions=True)

    # In buckets of 8 tokens: two long prompts, and four short ones, one more than a batch takes.
    lengths, wanted = (10, 3, 14, 7, 5, 6), (4, 2, 3, 6, 3, 1)
    requests = [(torch.randint(97, (1, length)), new) for length, new in zip(lengths, wanted, strict=True)]
    alone = [decoder.generate(prompt, max_new_tokens=new) for prompt, new in requests]
    batcher = DynamicBatcher(Recorder(), max_batch_size=3, max_wait_time=60, length_tolerance=8)
    for came, expected in zip(await outcomes(batcher, requests), alone, strict=True):
        torch.testing.assert_close(came, expected)
    assert len(calls) < len(requests), "every request ran alone"
    assert max(rows for rows, _ in calls) <= 3, f"a batch is larger than max_batch_size: {calls}"
    assert sum(rows for rows, width in calls if width > 8) == 2, f"short and long prompts shared a batch: {calls}"

    batcher = DynamicBatcher(decoder, max_wait_time=60, max_queue_size=1)
    prompt, new = requests[0]
    empty, served, late = await outcomes(batcher, [(prompt[:, :0], new), (prompt, new), (prompt, new)])
    assert isinstance(empty, ValueError), "an empty prompt is accepted"
    assert isinstance(late, QueueFullError), "two requests wait where one may"
    torch.testing.assert_close(served, alone[0])


class Decoder(nn.Module):
    """Given; no need to change. A small decoder with random weights, in float64 so that rounding changes no token."""

    def __init__(self, vocabulary: int = 97, dim: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(DecoderBlock(dim, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.double()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        pad_token_id: int = 0,
    ) -> Tensor:
        """Continues each row from its last position.

        Args:
            input_ids: int64 [B, W].
            attention_mask: bool or 0/1 [B, W]; without one, everything is read.
            max_new_tokens: how many tokens each row gets.
            do_sample: draws each token; otherwise takes the likeliest.
            pad_token_id: would fill rows that end early; none does here.

        Returns:
            int64 [B, W + max_new_tokens].
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        visible = mask.bool()  # [B, W]
        caches: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        tokens = input_ids  # [B, T], those that are not in the caches
        for _ in range(max_new_tokens):
            positions = (visible.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.size(1) :]  # [B, T]; pads do not count
            x = self.embedding(tokens)  # [B, T, D]
            for layer, block in enumerate(self.blocks):
                x, caches[layer] = block(x, positions, visible, caches[layer])
            scores = self.head(self.norm(x[:, -1]))  # [B, V]
            tokens = torch.multinomial(scores.softmax(-1), 1) if do_sample else scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, tokens], dim=1)
            visible = torch.cat([visible, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        return input_ids


class DecoderBlock(nn.Module):
    """Given; no need to change. Attention with rotary positions and a key-value cache, and an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, positions: Tensor, visible: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the new features [B, T, D] and the cache: keys and values [B, H, S, Dh] of all S positions so far."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, positions), rotate(k, positions)  # [B, H, T, Dh]
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)  # [B, H, S, Dh]
        size, start = k.size(2), k.size(2) - q.size(2)
        allowed = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()[start:] & visible[:, None, None]
        # A pad reads itself, lest its softmax be empty; nobody reads the pad.
        allowed = allowed | torch.eye(size, dtype=torch.bool, device=x.device)[start:]  # [B, 1, T, S]
        context = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # [B, H, T, Dh]
        x = x + self.output(context.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), (k, v)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Given; no need to change. Rotates pairs of features of [B, H, T, Dh] by angles that grow with the position."""
    half = x.size(-1) // 2
    frequencies = 100.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = positions[:, None, :, None] * frequencies  # [B, 1, T, Dh / 2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)
