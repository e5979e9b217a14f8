"""ex04: Dynamic batching

A model that answers one prompt at a time leaves most of the device idle. A dynamic batcher lets callers come one by
one, holds each back for a moment, and runs prompts of similar length together: one `generate` call for many requests.
You write the queue, the padding, and the worker between the callers' event loops and the model.

Steps
1. Batches (40 min): 4.1, 4.2
2. Time and order (50 min): 4.3, 4.4, 4.5, 4.6
3. Faults, limits, shutdown (50 min): 4.7, 4.8, 4.9
4. Your own test, and style (40 min): 4.10, 4.11

Requirements
4.1 (efficiency) Batch similar lengths together: requests whose prompts fall into one length bucket share a `generate`
    call, two buckets never do. On the mix of 4.6, full batches get fewer than 1.3 prompt positions (pads included)
    sent to `generate` per real prompt token.
4.2 (correctness) Handle padding: every result equals what its request gets alone: the prompt and exactly max_length
    new tokens, greedily chosen, whatever shares the batch. Padding goes on the left and is never attended to. A prompt
    may hold any token, 0 too, may have any strides, and is never written to. request_ids may repeat.
4.3 (correctness) Process in real time: callers on one or several event loops and threads wake as soon as their own
    batch is done, also where nothing else happens on their loop. The loops are never blocked. The batcher may be built
    inside or outside any event loop, and outlives the loops of its callers.
4.4 (efficiency) Use the device well: a full batch goes at once, without waiting for max_wait_time, also if another
    bucket has waited longer but may not go yet. One `generate` call per batch, never two at a time, for as many new
    tokens as the batch's longest request asks for. Requests that were cancelled before they started are in no call,
    and fill no batch.
4.5 (correctness) Keep to configurable limits: never more than max_batch_size requests in a batch. A batch that is not
    full goes once its oldest request has waited max_wait_time seconds (0: at once), by itself, and not before.
4.6 (correctness) Serve a mix of short and long sequences (25 to 32 and 90 to 96 tokens): all are served, none starves.
    Among the batches that may go (full, or overdue) the one whose oldest request has waited longest goes first, and a
    batch takes the oldest requests of its bucket.
4.7 (robustness) Survive faults: a request that cannot be valid (input_tokens not [1, L], not int64, or L = 0;
    max_length < 1) is refused with ValueError and harms no other. A model that raises fails that batch's callers, with
    an error of the same type and text, and the next batch works. A caller that is cancelled, or whose event loop is
    closed, costs its own request only.
4.8 (robustness) Push back: a request that would make more than max_queue_size wait gets QueueFullError at once.
    Requests that run do not count; one that was waiting frees its place as soon as its cancelled caller has ended.
4.9 (robustness) Shut down cleanly: shutdown serves what is queued, at once, without waiting for max_wait_time, and
    returns when it is served, as later calls do; nobody hangs. It may be called from any thread but the batcher's, an
    event loop's own included (which it blocks). add_request raises RuntimeError afterwards. The batcher's threads end.
4.10 (correctness) Write your own test: `test_dynamic_batcher` passes on right code, whoever wrote it, and fails on
    each of the slips listed below.
4.11 (readability) Reads well: ruff (E, F, W, B, lines up to 120; a docstring for each class and function that you
    add) and mypy (typed definitions) find nothing. It earns once half of the other requirements do.

In plain text
    bucket(L)    = ⌈L / length_tolerance⌉ · length_tolerance       with 32:  1 … 32 -> 32,  33 … 64 -> 64
    may go       = max_batch_size requests of one bucket wait, or its oldest has waited max_wait_time, or shutdown
    two prompts  7 8 9 and 5:   input_ids [[7, 8, 9], [0, 0, 5]],  attention_mask [[1, 1, 1], [0, 0, 1]]

Shapes
    B requests of a batch, L tokens of a prompt

Conventions
- `model.generate` takes input_ids (int64 [B, L]), attention_mask ([B, L]), max_new_tokens, do_sample and pad_token_id,
  by position or by keyword, and returns int64 [B, L + max_new_tokens]. The mask is boolean or 0/1; 1 means "is read".
  It is all that a batcher may ask of a model.
- A decoder continues from the last position, so padding stands on the left; on the right it would be continued from.
- Pads need a valid token id, 0. Only the mask tells a pad from a token 0 of a prompt.
- do_sample is False: a result then depends on its prompt alone, and on the model, which may change between batches.
- A bucket depends on the length of the prompt, not on max_length. Rows are cut to what their own request asked for.
- max_queue_size counts all waiting requests together, whatever their bucket. A request waits until a batch takes it:
  what comes in one turn of the event loop may all wait, a full batch too.
- Free, and nothing for your test to count on: which refusal comes first where several apply, and refusals beyond those
  listed; pads up to the longest prompt of the batch or to the bucket's edge; whether prompts are copied, and whether
  callers share one error; what becomes of a StopIteration, or of what is no Exception; what a batcher does that is
  never shut down.
- A future belongs to its event loop: `set_result` from another thread does not wake the loop, which sleeps until
  something else happens. A thread wakes it by `loop.call_soon_threadsafe`; or it fills a `concurrent.futures.Future`,
  which the caller awaits through `asyncio.wrap_future`.

Your own test (4.10) uses contract names and the given Decoder (or a model of your own), sets its own seed, takes at
most 1 s, and has to fail (or hang) on each of these slips:
- right_padding: the padding goes on the right
- no_attention_mask: generate gets no attention_mask
- pads_kept: a row keeps its padding, and lacks tokens at its end
- not_cut: a row keeps all the tokens that the batch's longest request asked for
- wrong_caller: the results of a batch are handed out in reverse order
- mixes_buckets: all lengths share one bucket's queue
- one_by_one: generate is called for each request alone
- limit_exceeded_by_one: a batch takes max_batch_size + 1 requests
- empty_prompt_accepted: a prompt without tokens is not refused
- queue_never_full: max_queue_size is ignored

Discuss
1. Scale to production: what do you change to serve many requests whose answers end at different times, on several
   devices (continuous batching, a paged cache)?
2. Limits: at which arrival rates does waiting for a batch not pay, and how would you choose max_wait_time and
   length_tolerance?
3. Monitoring: which numbers of this batcher would you log to see trouble (queue depth, batch fill, padding share,
   latency percentiles) early?
4. Next: what would you optimise next, and how would you prove that it helped?

Sources
- Yu et al. 2022, "Orca: a distributed serving system for transformer-based generative models":
  https://www.usenix.org/conference/osdi22/presentation/yu
- Developing with asyncio, concurrency and multithreading:
  https://docs.python.org/3/library/asyncio-dev.html#concurrency-and-multithreading
"""

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

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
        """Continues each row of int64 [B, L]: [B, L + max_new_tokens]."""


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
        model: what generates; only its `generate` is used, by one thread at a time.
        max_batch_size: most requests in a batch.
        max_wait_time: seconds after which the oldest request of a batch has waited enough.
        length_tolerance: width of a length bucket, in tokens.
        max_queue_size: most requests that may wait; those that run do not count.
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
        # TODO(4.5, 4.8): keep the limits, and make a queue.
        # TODO(4.3): make what will run the batches: it belongs to no caller's event loop.
        raise NotImplementedError("TODO 4.3: __init__")

    def get_length_bucket(self, seq_len: int) -> int:
        """The upper edge of the bucket that a prompt of `seq_len` tokens falls into.

        Args:
            seq_len: tokens of the prompt, at least 1.
        """
        # TODO(4.1): 1 … length_tolerance fall into the first bucket.
        raise NotImplementedError("TODO 4.1: get_length_bucket")

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
        # TODO(4.7): refuse what cannot be valid.
        # TODO(4.8): refuse what would be too much.
        # TODO(4.4, 4.6): queue the rest; a worker runs, one after the other, the batches that may go, the oldest first.
        # TODO(4.2): pad each batch on the left, mask the pads, call generate once, and cut each row.
        # TODO(4.3): wait for the result without blocking the event loop.
        raise NotImplementedError("TODO 4.3: add_request")

    def shutdown(self) -> None:
        """Takes no more requests, serves what waits, and returns when that is done; later calls change nothing."""
        # TODO(4.9): wake the worker, and wait for its end.
        raise NotImplementedError("TODO 4.9: shutdown")


async def test_dynamic_batcher() -> None:
    """Your own test of DynamicBatcher: passes on right code, fails on each slip listed above."""
    # TODO(4.10): ask for several things at once, and compare with what the model gives each alone.
    # TODO(4.11): make lint-clean, typed code of it all.
    raise NotImplementedError("TODO 4.10: test_dynamic_batcher")


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
            input_ids: int64 [B, L].
            attention_mask: bool or 0/1 [B, L]; without one, everything is read.
            max_new_tokens: how many tokens each row gets.
            do_sample: draws each token; otherwise takes the likeliest.
            pad_token_id: would fill rows that end early; none does here.

        Returns:
            int64 [B, L + max_new_tokens].
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        visible = mask.bool()  # [B, L]
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
