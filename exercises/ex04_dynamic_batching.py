"""ex04: Dynamic batching

A model that answers one prompt at a time leaves most of the device idle. A dynamic batcher lets
callers come one by one, and runs prompts of similar length together: many requests, one call of
`generate`. You write what stands between the callers' event loops and the model: the queue, the
padding, and the worker that runs one batch after the other.

Steps
1. Batches (40 min): 4.1, 4.2
2. Callers (25 min): 4.3
3. Time and order (40 min): 4.4, 4.5, 4.6
4. Faults, full queue, shutdown (40 min): 4.7, 4.8, 4.9
5. Your own test, and style (45 min): 4.10, 4.11
Step 1 needs a first worker thread and a way to wake a caller: read 4.3 too.

Requirements
4.1 (efficiency) Batch similar lengths together: requests of one length bucket share a call of
    `generate`; two buckets never do. With full batches of 4.6's mix, the sum of B·W over all calls
    is below 1.3 times the number of prompt tokens.
4.2 (correctness) Handle padding: a caller gets what its request gets alone, whatever shares the
    batch: its prompt, then exactly max_length new tokens, greedily chosen.
    - Pads are token 0, stand on the left, and are never attended to.
    - A prompt may hold any token, 0 and those beyond 2^53 too, and have any strides.
4.3 (correctness) Process in real time: callers wake as soon as their own batch is done.
    - They come from one or several event loops and threads, and share batches.
    - They wake also on a loop where nothing else happens, to a result or to an error.
    - No loop is blocked, neither while `generate` runs nor while shutdown waits in another thread.
    - You can build the batcher inside or outside an event loop; it outlives its callers' loops.
4.4 (efficiency) Use the device well: a batch is one call of `generate`, with one row per request
    and their largest max_length as max_new_tokens; never two calls at a time.
    - A full batch goes as soon as no call runs, also past an older request that may not go yet
      ("In plain text" says what these words mean).
    - Once the cancelled caller of a waiting request has ended, the request is in no call, fills no
      batch and makes no call longer.
4.5 (correctness) Keep to configurable limits: a batch has at most max_batch_size requests. One that
    is not full goes once its oldest request has waited max_wait_time seconds (0: at once):
    not before, and also if nothing else happens.
4.6 (correctness) Serve a mix of short and long sequences: prompts of 25 to 32 and of 90 to 96
    tokens are all served. Of the batches that may go, the one whose oldest request has waited
    longest goes first. A batch takes the oldest requests of its bucket.
4.7 (robustness) Survive faults: a fault costs its own requests only.
    - input_tokens that are not int64 [1, L], L >= 1, and max_length < 1, get ValueError at once.
    - If `generate` raises, each caller of that batch gets an error of the same type and text, also
      if the type's __init__ makes the text: hand on the error itself. The next batch works.
    - A caller that is cancelled, or whose loop closes as under asyncio.run, harms no other caller.
4.8 (robustness) Push back: a request that would make more than max_queue_size wait gets
    QueueFullError at once. All that wait count, of any bucket and loop; those that run do not.
    A place is free once a batch takes its request or its cancelled caller has ended.
4.9 (robustness) Shut down cleanly: shutdown serves all that waits, without waiting for
    max_wait_time, and returns when the last batch is done. A second call, at any time, does too.
    - Any thread but the batcher's may call it, an event loop's too: that loop is blocked meanwhile.
    - Once it has returned, add_request raises RuntimeError. A request that comes while shutdown
      waits is served or gets RuntimeError; nobody hangs.
    - The batcher's threads, its timers too, have ended when it returns, or end right after.
4.10 (correctness) Write your own test: `test_dynamic_batcher` passes on right code, whoever wrote
    it, and fails on each of the slips listed below.
4.11 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one, for
    each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    bucket(L) = ⌈L / length_tolerance⌉ · length_tolerance     with 32: 1 … 32 -> 32, 33 … 64 -> 64
    result i  = output[i, pads_i : W + max_length_i]          pads_i = W - L_i

    waits     a request, until a batch takes it or its cancelled caller has ended
    runs      a request, from then until its call of `generate` returns or raises
    ended     a caller whose add_request has raised CancelledError: later than task.cancel()
    full      a bucket of which max_batch_size requests wait
    overdue   a bucket whose oldest request has waited max_wait_time
    may go    a batch of a full or overdue bucket; once shutdown is called, of any bucket

Shapes
    B requests in a batch, L tokens of a prompt, W columns of a batch: its longest L, or more

By hand
    7 8 9 for one new token and 5 for two; a … d are new tokens
      input_ids  7 8 9      attention_mask  1 1 1      max_new_tokens 2
                 0 0 5                      0 0 1
      output     7 8 9 a b      results  7 8 9 a    output[0, 0:4]
                 0 0 5 c d               5 c d      output[1, 2:5]
      6 positions for 4 prompt tokens: 1.5

    max_batch_size 2, max_wait_time 100 ms, buckets of 8; each call takes 100 ms
      ms   comes         waits in 8   in 16   what goes
      0    a, 12 tokens               a
      20   b, 5          b            a
      30   c, 7          b c          a       b c: full, though a is older
      40   d, 3          d            a
      60   e, 8          d e          a       nothing: a call runs
      130                d e          a       a: overdue since 100, and older than d
      230                d e                  d e: full since 60
      300  f, 9                       f
      330                             f       nothing: f has waited 30 ms
      400                             f       f: it has waited 100 ms

Conventions
- A model has `generate`, and maybe nothing else. It takes input_ids (int64 [B, W]), attention_mask
  ([B, W]), max_new_tokens, do_sample (False) and pad_token_id (0), all of them, by position or by
  keyword, and returns int64 [B, W + max_new_tokens].
- A mask is boolean or 0/1 in uint8, int32, int64, float32 or float64; true or 1 means "may attend".
- A decoder continues from the last position, so pads stand on the left. Only the mask tells a
  pad from a token 0 of a prompt.
- A bucket depends on the prompt's length alone, not on max_length.
- A request's time counts from its add_request, also while the device is busy. The time of one that
  has gone, or was cancelled, counts for no other.
- request_ids may repeat, and one tensor may be the prompt of several requests.
- Inputs are never written to, not even to be restored.
- Weights may change between calls, in place, by loading or by a cast; the next call uses the new
  ones. So a prompt that comes again is run again.
- set_result from another thread does not wake an asyncio future's loop. Use
  `loop.call_soon_threadsafe`, or await a `concurrent.futures.Future` by `asyncio.wrap_future`.
- asyncio.run cancels the callers that are left, waits for their end, and closes their loop.
- A submission is one file on torch and the standard library.

Not defined
- whether a request counts, or runs, between its task.cancel() and its caller's end; an event loop
  that is closed before its callers have ended
- when batches take requests that come in one turn of an event loop: all may wait first, a full
  batch too; the order of those that come from two loops at the same moment
- which refusal comes first where several apply; others than those listed; pads up to the bucket's
  edge; whether prompts are copied, results are views, or callers share one error
- out of `generate`: StopIteration, an error that asyncio.wrap_future changes, what is no Exception
- a model whose `generate` is replaced, which writes to its inputs, or which uses its output again
- devices other than the CPU; input_tokens that are no Tensor; a max_wait_time below 0 or above a
  day; any other limit below 1; a batcher that is never shut down, or that `generate` shuts down

Your own test (4.10) runs on other code, right and wrong, in place of your BatchRequest,
DynamicBatcher and QueueFullError. It may use DynamicBatcher and QueueFullError as this text has
them, the given Decoder, and models and helpers in this file; no field of BatchRequest, no thread,
nothing that is not defined. It sets its own seed, and takes at most 1 s on right code. How to see
- what a request gets alone: call the Decoder's `generate` with its prompt
- who shares a call: give the batcher a model that notes the shape of input_ids and calls a Decoder
- a queue: hold `generate` back with a threading.Event; once your model has noted the call, what
  you ask for waits. Where no batch gets full, you may also start tasks, `await asyncio.sleep(0)` so
  that each begins, and call shutdown, which serves them
- time: measure no short times; with max_wait_time=60 a batch that is not full stays
It has to fail (or hang) on each of these slips:
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
1. Scale to production: how do you serve requests whose answers end at different times, on several
   devices (continuous batching, a paged cache)?
2. Limits: when does waiting for a batch not pay; how do you choose max_wait_time and the buckets?
3. Monitoring: which numbers of this batcher show trouble early (queue depth, batch fill, latency)?
4. Next: what would you optimise next, and how would you prove that it helped?

Sources
- Yu et al. 2022, Orca: a distributed serving system for transformer-based generative models:
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
        # TODO(4.2): keep the limits, make a queue, and start what runs its batches.
        # TODO(4.3): let that belong to no caller's event loop.
        raise NotImplementedError("TODO 4.2: __init__")

    def get_length_bucket(self, seq_len: int) -> int:
        """The upper edge of the bucket that a prompt of `seq_len` tokens falls into.

        Args:
            seq_len: tokens of the prompt, at least 1.
        """
        # TODO(4.1): round seq_len up to a multiple of length_tolerance.
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
        # TODO(4.2): queue the request. Run each batch: pad on the left, mask the pads, call generate, cut each row.
        # TODO(4.3): await the result without blocking the event loop; have its caller woken on the caller's own loop.
        # TODO(4.4, 4.5, 4.6): before each batch, look at all that wait; run the one that may go and is oldest.
        # TODO(4.7): refuse what cannot be valid; hand an error of generate to the callers of its batch.
        # TODO(4.8): refuse what would be one too many.
        raise NotImplementedError("TODO 4.2: add_request")

    def shutdown(self) -> None:
        """Takes no more requests, serves all that wait, and returns when that is done, however often it is called."""
        # TODO(4.9): refuse what comes from now on, let what waits go at once, and wait for the worker's end.
        raise NotImplementedError("TODO 4.9: shutdown")


async def test_dynamic_batcher() -> None:
    """Your own test of DynamicBatcher: passes on right code, fails on each slip listed above."""
    # TODO(4.10): ask for several things at once, and compare each with what the Decoder gives it alone.
    # TODO(4.11): type what you define, and document what is public.
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
