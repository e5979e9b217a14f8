"""The answer to ex11, Speculative decoding."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


# Given; no need to change.
@dataclass(frozen=True)
class Generation:
    """What speculative_generate returns.

    Attributes:
        tokens: the new ones, without the prompt.
        rounds, proposed, accepted: target calls; proposed tokens; those of them that are in `tokens`.
    """

    tokens: list[int]
    rounds: int
    proposed: int
    accepted: int

    @property
    def acceptance_rate(self) -> float:
        """accepted / proposed; 0 if nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0


class CachedModel:
    """A model and the keys and values of one sequence, which it is fed piece by piece.

    Args:
        model: a Decoder, or what has its attributes and its call.

    Attributes:
        length: how many tokens it has been fed and has not forgotten.
    """

    length: int

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.length = 0
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [length, Hkv, Dh] of each layer

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Goes on with a sequence, by one call of the model with these tokens alone.

        Args:
            tokens: the next T of the sequence, T ≥ 1.

        Returns:
            [T, V], the logits of what follows each of them, in the model's dtype.
        """
        device = next(self.model.parameters()).device
        grown: dict[int, tuple[Tensor, Tensor]] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer in self._held:
                keys, values = self._held[layer]
                k, v = torch.cat([keys, k]), torch.cat([values, v])
            grown[layer] = k, v
            return causal_attention(q, k, v)

        positions = torch.arange(self.length, self.length + len(tokens), device=device)
        logits: Tensor = self.model(torch.tensor(tokens, device=device), positions, attend)  # [T, V]
        # Only now, so that an error of the model leaves everything as it was.
        self._held, self.length = grown, self.length + len(tokens)
        return logits

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens.

        Raises:
            ValueError: length is below 0 or above the length that there is.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: {self.length} tokens are held")
        self._held = {layer: (keys[:length], values[:length]) for layer, (keys, values) in self._held.items()}
        self.length = length


def token_probabilities(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The probabilities that tokens are drawn with.

    Args:
        logits: [..., V], any floating dtype.
        temperature: 0 for the most probable token, else what the logits are divided by.
        top_p: the sum that the most probable tokens have to reach, in (0, 1]; 1 keeps all.

    Returns:
        float64 [..., V].
    """
    logits = logits.double()
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
    probabilities = (logits / temperature).softmax(dim=-1)  # [..., V]
    if top_p == 1:
        return probabilities
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.zeros_like(probabilities).scatter(-1, tokens, ordered * (before < top_p))
    return kept / kept.sum(dim=-1, keepdim=True)


def draw(probabilities: Tensor, u: float) -> int:
    """The first token whose cumulative probability exceeds u, never one of probability 0.

    Args:
        probabilities: float64 [V].
        u: 0 ≤ u < 1.
    """
    exceeds = probabilities.cumsum(dim=-1) > u
    if exceeds[-1]:
        return int(exceeds.int().argmax())
    return int(probabilities.nonzero()[-1])  # rounding has left the sum at u or below


def verify(
    draft_tokens: Sequence[int], draft_probs: Tensor, target_probs: Tensor, uniform: Callable[[], float]
) -> list[int]:
    """Judges the proposed tokens.

    Args:
        draft_tokens: k ≥ 0 of them.
        draft_probs: float64 [k, V], what each was drawn from.
        target_probs: float64 [k + 1, V], what the target says in their places, and behind them.
        uniform: gives a number in [0, 1) at each call.

    Returns:
        The accepted ones, then one token more.
    """
    for i, token in enumerate(draft_tokens):
        p, q = target_probs[i], draft_probs[i]  # [V]
        # Not <=: where p is 0, a number of 0.0 rejects as well.
        if not uniform() * float(q[token]) < float(p[token]):
            rest = (p - q).clamp(min=0)
            last = rest / rest.sum() if rest.any() else p
            return [*draft_tokens[:i], draw(last, uniform())]
    return [*draft_tokens, draw(target_probs[len(draft_tokens)], uniform())]


def speculative_generate(
    target: Decoder,
    draft: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    num_draft_tokens: int = 4,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    uniform: Callable[[], float] = random.random,
) -> Generation:
    """Continues a prompt as the target would, with the draft's help.

    Args:
        target, draft: of one vocabulary.
        prompt: at least one token.
        max_new_tokens: how many tokens come, unless eos_token_id comes before.
        num_draft_tokens: at most so many are proposed in a round.
        temperature, top_p: as in token_probabilities, for both models.
        eos_token_id: ends the output; None: nothing does.
        uniform: gives a number in [0, 1) at each call.

    Raises:
        ValueError: an argument is outside of what 11.9 lists.
    """
    _refuse(target, draft, prompt, max_new_tokens, num_draft_tokens, temperature, top_p)
    proposer, judge = CachedModel(draft), CachedModel(target)
    tokens, end = list(prompt), len(prompt) + max_new_tokens
    rounds = proposed = accepted = 0
    while len(tokens) < end and (not rounds or tokens[-1] != eos_token_id):
        proposals: list[int] = []
        draft_rows: list[Tensor] = []
        while len(proposals) < min(num_draft_tokens, end - len(tokens) - 1) and eos_token_id not in proposals:
            logits = proposer.feed([*tokens, *proposals][proposer.length :])  # [T, V]
            draft_rows.append(token_probabilities(logits[-1], temperature, top_p))
            proposals.append(draw(draft_rows[-1], uniform()))
        logits = judge.feed([*tokens, *proposals][judge.length :])  # [T, V]
        target_probs = token_probabilities(logits[-len(proposals) - 1 :], temperature, top_p)  # [k + 1, V]
        draft_probs = torch.stack(draft_rows) if draft_rows else target_probs[:0]  # [k, V]
        came = verify(proposals, draft_probs, target_probs, uniform)

        rounds, proposed, accepted = rounds + 1, proposed + len(proposals), accepted + len(came) - 1
        # An EOS among the proposed tokens is the last of them: only a bonus can stand behind it.
        tokens += came[: came.index(eos_token_id) + 1] if eos_token_id in came else came
        proposer.rewind(min(proposer.length, len(tokens) - 1))
        judge.rewind(len(tokens) - 1)
    return Generation(tokens[len(prompt) :], rounds, proposed, accepted)


def _refuse(
    target: Decoder,
    draft: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    num_draft_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    if target.vocab_size != draft.vocab_size:
        raise ValueError(f"the target has {target.vocab_size} tokens, the draft {draft.vocab_size}")
    if not prompt or not all(0 <= token < target.vocab_size for token in prompt):
        raise ValueError(f"prompt: one or more tokens from 0 to {target.vocab_size - 1} are wanted")
    if max_new_tokens < 1 or num_draft_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}, num_draft_tokens {num_draft_tokens}: 1 or more are wanted")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: ≥ 0 and in (0, 1] are wanted")


def expected_speedup(acceptance_rate: float, num_draft_tokens: int, draft_cost: float) -> float:
    """How many times as fast as the target alone decoding with a draft is expected to be.

    Args:
        acceptance_rate: how probably a proposed token is accepted, 0 … 1.
        num_draft_tokens: tokens that are proposed in each round.
        draft_cost: what a draft call costs, in target calls.
    """
    tokens = sum(acceptance_rate**i for i in range(num_draft_tokens + 1))
    return tokens / (num_draft_tokens * draft_cost + 1)


def test_speculative_decoding() -> None:
    """Your own test of speculative decoding: passes on right code, fails on each slip listed above."""
    # The law of verify: a rejection in the first row, or in the second one, or a bonus.
    q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    p = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.0, 0.0, 1.0]], dtype=torch.float64)
    came: dict[tuple[int, ...], float] = {}
    for numbers in itertools.product([0.125, 0.375, 0.625, 0.875], repeat=3):
        output = tuple(verify([1, 0], q, p, itertools.cycle(numbers).__next__))
        came[output] = came.get(output, 0) + 1 / 64
    # 1 of row 0 is accepted with 1/2, 0 of row 1 with 1/2.
    assert came == {(2,): 0.5, (1, 1): 0.125, (1, 2): 0.125, (1, 0, 2): 0.25}, f"verify: {came}"

    torch.manual_seed(0)
    target, draft = Decoder(11).double(), Decoder(11, num_layers=1).double()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(3)  # so that what stands before counts
        draft.embed.weight.copy_(target.embed.weight)
        draft.head.weight.copy_(target.head.weight)
    prompt, new = [3, 1, 4], 10
    alone = generate_alone(target, prompt, new)
    for other in (draft, target):
        greedy = speculative_generate(target, other, prompt, new, num_draft_tokens=3)
        assert greedy.tokens == alone, f"greedy: {greedy.tokens}, alone: {alone}"
    for eos in set(alone):
        ended = speculative_generate(target, target, prompt, new, num_draft_tokens=3, eos_token_id=eos)
        assert ended.tokens == alone[: alone.index(eos) + 1], f"EOS {eos}: {ended.tokens} of {alone}"

    # So small a top_p leaves one token of each row, whatever uniform gives.
    for u in (0.1, 0.5, 0.9):
        sampled = speculative_generate(
            target,
            target,
            prompt,
            new,
            num_draft_tokens=3,
            temperature=1.0,
            top_p=0.01,
            uniform=itertools.repeat(u).__next__,
        )
        assert (sampled.tokens, sampled.acceptance_rate) == (alone, 1.0), f"top_p 0.01, uniform {u}: {sampled}"
    assert math.isclose(expected_speedup(0.5, 2, 0.25), 1.75 / 1.5), "expected_speedup"
