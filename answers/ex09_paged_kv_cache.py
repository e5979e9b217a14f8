"""The answer to ex09, Paged key-value cache and continuous batching."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OutOfBlocksError(RuntimeError):
    """Given; no need to change. No block is free."""


class BlockAllocator:
    """Hands out the blocks 0 … num_blocks − 1, and counts how many hold each; at first all are free.

    Args:
        num_blocks: how many there are.

    Attributes:
        num_free: how many are free.
    """

    def __init__(self, num_blocks: int) -> None:
        self._counts = [0] * num_blocks
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def allocate(self) -> int:
        """Any free block, whose count is 1 from now on; OutOfBlocksError if there is none."""
        if not self._free:
            raise OutOfBlocksError(f"all {len(self._counts)} blocks are in use")
        block = self._free.pop()
        self._counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Counts one more holder; ValueError for a block that is not in use or does not exist."""
        self._check_used(block)
        self._counts[block] += 1

    def free(self, block: int) -> None:
        """Counts one holder less, at 0 the block is free; ValueError as for share."""
        self._check_used(block)
        self._counts[block] -= 1
        if not self._counts[block]:
            self._free.append(block)

    def ref_count(self, block: int) -> int:
        """How many hold a block; 0: it is free."""
        return self._counts[block]

    def _check_used(self, block: int) -> None:
        if not 0 <= block < len(self._counts) or not self._counts[block]:
            raise ValueError(f"block {block} is not in use")


class PagedKVCache:
    """Keys and values of many sequences in blocks of one pool. Sequences go by any numbers of the caller's.

    Args:
        num_layers, num_blocks, block_size, num_kv_heads, head_dim: sizes; block_size in slots, one for each token.
        dtype, device: of the pool.

    Attributes:
        allocator: the BlockAllocator of the pool.
        keys, values: [num_layers, num_blocks, block_size, Hkv, Dh]; made once.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        self.allocator = BlockAllocator(num_blocks)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._block_size = block_size
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def append(self, sequence: int, count: int) -> None:
        """Hands out slots for `count` more tokens, or raises OutOfBlocksError; an unknown sequence is new and empty."""
        table, length = self._tables.get(sequence, []), self.length(sequence)
        copies = count > 0 and length % self._block_size > 0 and self.allocator.ref_count(table[-1]) > 1
        needed = math.ceil((length + count) / self._block_size) - len(table) + copies
        if needed > self.allocator.num_free:
            raise OutOfBlocksError(f"{needed} more blocks are needed, {self.allocator.num_free} are free")

        added = [self.allocator.allocate() for _ in range(needed)]
        if copies:
            shared = table.pop()
            for pool in (self.keys, self.values):
                pool[:, added[0]] = pool[:, shared]
            self.allocator.free(shared)
        self._tables[sequence], self._lengths[sequence] = table + added, length + count

    @torch.no_grad()
    def write(self, layer: int, sequence: int, start: int, k: Tensor, v: Tensor) -> None:
        """Writes keys and values of one layer to slots that `append` has handed out.

        Args:
            start: position of the first.
            k, v: [n, Hkv, Dh], for the positions start … start + n − 1.
        """
        slots = self._slots(sequence, start, start + len(k))
        for pool, new in ((self.keys, k), (self.values, v)):
            pool[layer].flatten(0, 1)[slots] = new  # [num_blocks · block_size, Hkv, Dh], a view

    def fork(self, parent: int, child: int, length: int) -> None:
        """Begins `child`, a new sequence, with the first `length` ≥ 1 tokens of `parent`; copies nothing."""
        self._tables[child] = self._tables[parent][: math.ceil(length / self._block_size)]
        self._lengths[child] = length
        for block in self._tables[child]:
            self.allocator.share(block)

    def free(self, sequence: int) -> None:
        """Forgets a sequence, and gives its blocks back."""
        for block in self._tables.pop(sequence):
            self.allocator.free(block)
        del self._lengths[sequence]

    def length(self, sequence: int) -> int:
        """Slots that a sequence has been handed; 0 if it is unknown."""
        return self._lengths.get(sequence, 0)

    def block_table(self, sequence: int) -> list[int]:
        """The blocks of a sequence in the order of its positions, as a copy; [] if it is unknown."""
        return list(self._tables.get(sequence, []))

    def _slots(self, sequence: int, start: int, stop: int) -> list[int]:
        """Where some positions of a sequence lie in the pool, counted through all blocks."""
        table, size = self._tables[sequence], self._block_size
        return [table[position // size] * size + position % size for position in range(start, stop)]


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, context_lens: Tensor, query_lens: Tensor
) -> Tensor:
    """Causal attention of several sequences whose keys and values lie in blocks of one layer's pool.

    Args:
        q: [T, H, Dh], the last query_lens[i] tokens of each sequence i, one sequence after the other.
        keys, values: [num_blocks, block_size, Hkv, Dh]; query head h reads head h // (H // Hkv).
        block_tables: int64 [S, M]; position p of sequence i lies in slot p % block_size of block
            block_tables[i, p // block_size].
        context_lens: int64 [S], tokens of each sequence, those of q among them.
        query_lens: int64 [S], at least 1 each.

    Returns:
        [T, H, Dh], in q's dtype.
    """
    block_size, outputs = keys.shape[1], []
    queries, lengths = q.split(query_lens.tolist()), context_lens.tolist()
    for own, table, length in zip(queries, block_tables, lengths, strict=True):
        blocks = table[: math.ceil(length / block_size)]
        k, v = (pool[blocks].flatten(0, 1)[:length] for pool in (keys, values))  # [length, Hkv, Dh]
        outputs.append(causal_attention(own, k, v))
    return torch.cat(outputs)


@dataclass
class _Request:
    """What is asked for: its tokens so far, how many there may be, and how many lie in the cache."""

    id: int
    tokens: list[int]
    prompt: int
    most: int
    fed: int = 0


class Engine:
    """Runs many requests on a model at once; they join and leave between steps.

    Args:
        model: what generates.
        num_blocks, block_size: of the cache.
        max_batch_size: most requests that run.
        eos_token_id: the token that ends a request.

    Attributes:
        cache: a PagedKVCache in the model's dtype, on its device; its sequence numbers are the request ids.
    """

    def __init__(
        self,
        model: "Decoder",
        num_blocks: int,
        block_size: int,
        max_batch_size: int = 8,
        eos_token_id: int | None = None,
    ) -> None:
        weight = next(model.parameters())
        sizes = model.num_layers, num_blocks, block_size, model.num_kv_heads, model.head_dim
        self.cache = PagedKVCache(*sizes, dtype=weight.dtype, device=weight.device)
        self._model, self._device = model, weight.device
        self._num_blocks, self._block_size = num_blocks, block_size
        self._max_batch_size, self._eos_token_id = max_batch_size, eos_token_id
        self._submitted = 0
        self._waiting: list[_Request] = []  # both the oldest first
        self._running: list[_Request] = []
        self._finished: dict[int, list[int]] = {}
        self._counts = dict.fromkeys(("cancelled", "preemptions", "model_calls", "tokens_fed", "tokens_generated"), 0)

    def submit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Queues a request, without a call of the model.

        Args:
            prompt: at least one token.
            max_new_tokens: how many more there may be, at least 1.

        Returns:
            The request's id: 0, 1, 2, …

        Raises:
            ValueError: the request cannot be valid, or its blocks can never be there; nothing has changed.
        """
        tokens = list(prompt)
        needed = math.ceil((len(tokens) + max_new_tokens - 1) / self._block_size)
        if not tokens:
            raise ValueError("the prompt is empty")
        if bad := [token for token in tokens if not 0 <= token < self._model.vocab_size]:
            raise ValueError(f"tokens {bad} are not below {self._model.vocab_size}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1 is wanted")
        if needed > self._num_blocks:
            raise ValueError(f"{needed} blocks are needed, there are {self._num_blocks}")
        self._waiting.append(_Request(self._submitted, tokens, len(tokens), len(tokens) + max_new_tokens))
        self._submitted += 1
        return self._submitted - 1

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """Makes room, admits, calls the model at most once, and returns {id: new token} of every request that ran."""
        # After a call that failed all of this has been done already, and changes nothing.
        for request in list(self._running):
            while request in self._running and not self._has_slots(request):
                self._preempt(self._running[-1])
        while self._waiting and len(self._running) < self._max_batch_size and self._admit(self._waiting[0]):
            self._running.append(self._waiting.pop(0))
        if not self._running:
            return {}
        news = dict(zip([request.id for request in self._running], self._call(), strict=True))
        for request in list(self._running):
            self._counts["tokens_fed"] += len(request.tokens) - request.fed
            request.fed = len(request.tokens)
            request.tokens.append(news[request.id])
            if request.tokens[-1] == self._eos_token_id or len(request.tokens) == request.most:
                self._finished[request.id] = request.tokens[request.prompt :]
                self._running.remove(request)
                self.cache.free(request.id)
        self._counts["model_calls"] += 1
        self._counts["tokens_generated"] += len(news)
        return news

    def run(self) -> dict[int, list[int]]:
        """Steps until nothing is left, and returns {id: new tokens} of every request finished so far."""
        while self._waiting or self._running:
            self.step()
        return {number: list(tokens) for number, tokens in self._finished.items()}

    def cancel(self, request_id: int) -> bool:
        """Ends a request, and frees its blocks; True if it was waiting or running."""
        for requests in (self._waiting, self._running):
            for request in requests:
                if request.id == request_id:
                    requests.remove(request)
                    if requests is self._running:
                        self.cache.free(request_id)
                    self._counts["cancelled"] += 1
                    return True
        return False

    def metrics(self) -> dict[str, int]:
        """The nine numbers by name, as they are now or have added up so far."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "finished": len(self._finished),
            "blocks_used": self._num_blocks - self.cache.allocator.num_free,
            **self._counts,
        }

    def _has_slots(self, request: _Request) -> bool:
        """Hands a running request the slots for what it feeds, if there are any."""
        try:
            self.cache.append(request.id, len(request.tokens) - self.cache.length(request.id))
        except OutOfBlocksError:
            return False
        return True

    def _preempt(self, request: _Request) -> None:
        self._running.remove(request)
        self._waiting.insert(0, request)  # It is older than all that wait.
        self.cache.free(request.id)
        request.fed = 0
        self._counts["preemptions"] += 1

    def _admit(self, request: _Request) -> bool:
        """Gives a waiting request its blocks, the first of them shared where another one has fed the same tokens."""
        source = max(self._running, key=lambda other: _common(request, other), default=request)
        shared = _common(request, source)
        needed = math.ceil(len(request.tokens) / self._block_size) - shared // self._block_size
        if needed > self.cache.allocator.num_free:
            return False
        if shared:
            self.cache.fork(source.id, request.id, shared)
        self.cache.append(request.id, len(request.tokens) - shared)
        request.fed = shared
        return True

    def _call(self) -> list[int]:
        """Feeds what is not in the cache yet, in one call; the most probable token of each that runs."""
        running, device = self._running, self._device
        tables = [self.cache.block_table(request.id) for request in running]
        widest = max(map(len, tables))
        block_tables = torch.tensor([table + [-1] * (widest - len(table)) for table in tables], device=device)  # [S, M]
        context_lens = torch.tensor([len(request.tokens) for request in running], device=device)
        query_lens = torch.tensor([len(request.tokens) - request.fed for request in running], device=device)
        slots = [slot for r in running for slot in self.cache._slots(r.id, r.fed, len(r.tokens))]
        where = torch.tensor(slots, device=device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            keys.flatten(0, 1)[where], values.flatten(0, 1)[where] = k, v
            return paged_attention(q, keys, values, block_tables, context_lens, query_lens)

        tokens = torch.tensor([token for r in running for token in r.tokens[r.fed :]], device=device)
        positions = torch.tensor([p for r in running for p in range(r.fed, len(r.tokens))], device=device)
        logits = self._model(tokens, positions, attend)  # [T, V]
        return logits[query_lens.cumsum(0) - 1].argmax(dim=-1).tolist()


def _common(request: _Request, other: _Request) -> int:
    """How many of a newcomer's first tokens another one has fed; the last has to be fed anew."""
    limit = min(len(request.tokens) - 1, other.fed)
    return next((i for i in range(limit) if request.tokens[i] != other.tokens[i]), limit)


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


# Given; no need to change.
class Decoder(nn.Module):
    """A Llama-style decoder that keeps no keys: `attend` attends, and remembers what there is to remember.

    Pre-norm RMSNorm, rotary positions in half-split layout, grouped heads, a gated SiLU MLP, no biases.

    Args:
        vocab_size, d_model, num_layers, d_ff: sizes; d_ff is the width inside the MLP.
        num_heads, num_kv_heads: query heads and key-value heads; the former a multiple of the latter.
        head_dim: width of a head, even.
        base: base of the rotary frequencies.
        eps: what RMSNorm adds to the mean square.
        tied: the head's weight is the embedding's.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 32,
        num_layers: int = 2,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 8,
        d_ff: int = 64,
        base: float = 10000.0,
        eps: float = 1e-5,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size, self.num_layers = vocab_size, num_layers
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.embed = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            DecoderLayer(d_model, num_heads, num_kv_heads, head_dim, d_ff, base, eps) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(d_model, eps)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The logits of what follows each token.

        Args:
            tokens: int64 [T], those of all sequences one after the other, without padding.
            positions: int64 [T], the place of each in its sequence, from 0.
            attend: called once by each layer as attend(layer, q, k, v), with the layer's number, rotated
                q [T, H, Dh] and the new tokens' rotated k and v [T, Hkv, Dh]; returns [T, H, Dh].

        Returns:
            [T, vocab_size].
        """
        x = self.embed(tokens)
        for number, layer in enumerate(self.layers):
            x = layer(x, positions, number, attend)
        logits: Tensor = self.head(self.norm(x))
        return logits


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each behind a norm and added to its input."""

    def __init__(
        self, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int, d_ff: int, base: float, eps: float
    ) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.attention_norm, self.mlp_norm = nn.RMSNorm(d_model, eps), nn.RMSNorm(d_model, eps)
        self.q_proj = nn.Linear(d_model, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, d_model, bias=False)
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor, positions: Tensor, number: int, attend: Attend) -> Tensor:
        """x [T, d_model], positions [T] -> [T, d_model]."""
        normed = self.attention_norm(x)
        q, k, v = (p(normed).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        attended = attend(number, rotate(q, positions, self.base), rotate(k, positions, self.base), v)
        x = x + self.o_proj(attended.flatten(-2))
        normed = self.mlp_norm(x)
        output: Tensor = x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return output


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions in half-split layout: x [T, H, Dh], positions [T] -> [T, H, Dh]."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = positions[:, None, None] * frequencies  # [T, 1, Dh/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sequence: the last T of its S tokens look at themselves and at all before them.

    Args:
        q: [T, H, Dh].
        k, v: [S, Hkv, Dh], S ≥ T; query head h reads head h // (H // Hkv).

    Returns:
        [T, H, Dh], in q's dtype.
    """
    shared = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)  # [S, H, Dh]
    scores = torch.einsum("thd,shd->hts", q, keys) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)  # [H, T, S]
    return torch.einsum("hts,shd->thd", weights, values)


@torch.no_grad()
def generate_alone(
    model: Decoder, prompt: Sequence[int], max_new_tokens: int, eos_token_id: int | None = None
) -> list[int]:
    """The greedy continuation of one prompt, without a cache: every token reads everything again.

    Returns:
        The new tokens: max_new_tokens of them, or up to the first eos_token_id, which stays.
    """
    tokens, device = list(prompt), next(model.parameters()).device
    while len(tokens) < len(prompt) + max_new_tokens:
        fed, positions = torch.tensor(tokens, device=device), torch.arange(len(tokens), device=device)
        logits = model(fed, positions, lambda layer, q, k, v: causal_attention(q, k, v))
        tokens.append(int(logits[-1].argmax()))
        if tokens[-1] == eos_token_id:
            break
    return tokens[len(prompt) :]


def test_engine() -> None:
    """Your own test of the cache and the engine: passes on right code, fails on each slip listed above."""
    torch.manual_seed(0)
    allocator = BlockAllocator(3)
    assert len({allocator.allocate() for _ in range(3)}) == 3, "a block is handed out twice"

    # Two sequences that are one up to position 2, in blocks of 2; slots that nobody wrote hold NaN.
    cache = PagedKVCache(1, 6, 2, num_kv_heads=2, head_dim=4, dtype=torch.float64)
    cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
    k, v = torch.randn(2, 2, 5, 2, 4, dtype=torch.float64).unbind()  # [sequences, tokens, Hkv, Dh]
    k[1, :3], v[1, :3] = k[0, :3], v[0, :3]
    cache.append(0, 3)
    cache.write(0, 0, 0, k[0, :3], v[0, :3])
    cache.fork(0, 1, 3)
    for sequence in (1, 0):
        cache.append(sequence, 2)
        cache.write(0, sequence, 3, k[sequence, 3:], v[sequence, 3:])
    q = torch.randn(6, 4, 4, dtype=torch.float64)  # 4 tokens of sequence 0, 2 of sequence 1
    tables = torch.tensor([cache.block_table(0), cache.block_table(1)])
    lens = torch.tensor([5, 5]), torch.tensor([4, 2])
    expected = torch.cat([causal_attention(q[:4], k[0], v[0]), causal_attention(q[4:], k[1], v[1])])
    torch.testing.assert_close(paged_attention(q, cache.keys[0], cache.values[0], tables, *lens), expected)

    # Two requests outgrow the pool together; a third one is cancelled, and another one ends early.
    model = Decoder(11).double()
    prompts = [3, 1, 4, 1, 5], [9, 2, 6], [5, 3]
    alone = [generate_alone(model, prompt, 6) for prompt in prompts]
    engine = Engine(model, num_blocks=6, block_size=2)
    for prompt in prompts:
        engine.submit(prompt, 6)
    came: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(30):
        for number, token in engine.step().items():
            came[number].append(token)
        if step == 0:
            assert engine.cancel(2), "a request cannot be cancelled"
    assert came == {0: alone[0], 1: alone[1], 2: alone[2][:1]}, "not what each request gets alone"
    assert engine.metrics()["preemptions"], "nobody was preempted"
    assert engine.cache.allocator.num_free == 6, "blocks are lost"

    eos = alone[0][2]
    engine = Engine(model, num_blocks=6, block_size=2, eos_token_id=eos)
    engine.submit(prompts[0], 6)
    assert engine.run() == {0: generate_alone(model, prompts[0], 6, eos)}, "a request goes on after its end"
