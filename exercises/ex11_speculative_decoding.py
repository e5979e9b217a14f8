"""ex11: Speculative decoding

A large decoder makes one token per call, and most of the call's time goes into reading its weights.
In speculative decoding a small draft model proposes a few tokens, and one call of the large target
judges them all. What comes out has exactly the target's law, as if there were no draft.

Steps
1. Probabilities, accept and correct (35 min): 11.1, 11.2
2. Caches (25 min): 11.6
3. Rounds (50 min): 11.3, 11.4, 11.5
4. Ends, statistics, edges (30 min): 11.7, 11.8, 11.9
5. Your own test, and style (75 min): 11.10, 11.11

Requirements
11.1 (correctness) Turn logits into probabilities: in float64 from the start, for logits [..., V] of
    any floating dtype, any leading shape and any strides.
    - Divide by the temperature, take the softmax, then apply top_p. It keeps the smallest set of
      most probable tokens whose sum reaches top_p, of equal logits those of smaller index; the
      rest gets 0, and the kept ones are divided by their sum. top_p = 1 keeps all.
    - Temperature 0 gives exactly 1 to the most probable token, the first of equals, and 0 to all
      others, whatever top_p.
    - Some logits may be -inf. Logits of ±1e4 work, and temperature 1e-3, in float16 too.
11.2 (correctness) Accept and correct: for any draft tokens the output of `verify` has exactly the
    law of "In plain text". If they are drawn from draft_probs, its first token has the target's.
    - All randomness comes from `uniform()`. A decision (a draw, a test) takes a number of its own,
      never a used one, not even rescaled: at most k + 1 in `verify`, and 2·k + 1 in a round.
    - `draw` gives the first token whose cumulative probability exceeds u.
11.3 (correctness) Match the target's greedy output: with temperature 0 the tokens equal those of
    `generate_alone(target, …)`, for any draft, any num_draft_tokens and any uniform.
11.4 (correctness) Keep the law of whole outputs: over several rounds, with temperature and top_p,
    the output has the law of sampling from the target one token at a time. This holds for any
    draft, also for one that never proposes what the target wants, and up to EOS.
11.5 (efficiency) Feed nothing twice: a round makes one draft call per proposed token and one target
    call, with the tokens of "In plain text" and no others. With draft = target, n tokens take
    ⌈n / (num_draft_tokens + 1)⌉ rounds at any temperature and top_p, but for rounding.
11.6 (correctness) Cache and rewind: tokens that are fed in any pieces, rewound and fed again get
    the logits of one call with all of them.
    - `feed` is one model call with its own tokens alone, at their positions. It keeps no graph, and
      its logits ask for no gradient. `rewind` makes no call.
    - Two caches of one model are apart. If the model raises, be it KeyboardInterrupt, the error
      goes through, and the cache is as it was before.
    - `rewind` to more than is there, or below 0, raises ValueError with both numbers.
11.7 (correctness) End in time: exactly max_new_tokens come, or fewer up to the first eos_token_id,
    which stays. It may be proposed, a correction or a bonus, also in the first round; one in the
    prompt means nothing.
11.8 (correctness) Report the statistics: those of this call alone, as "In plain text" has them.
    `expected_speedup` follows its formula, also for an acceptance rate of 0 and of 1.
11.9 (robustness) Mind the edges: a token of probability 0 never comes out.
    - `uniform()` may give 0.0 and 1 - 2^-53, and probabilities may miss the sum 1 by rounding.
    - Where (p - q)+ is zero everywhere, as rounding can make it, the token comes from p.
    - Draft and target may differ in layers, heads and dtype, as bfloat16 and float64.
    - Each call starts afresh. Prompt, weights and training flags are left as they are.
    - ValueError comes before any model call for an empty prompt, a token of the prompt outside the
      vocabulary, max_new_tokens or num_draft_tokens below 1, a temperature below 0, a top_p outside
      (0, 1], and vocabularies that differ; the latter names both sizes.
11.10 (correctness) Write your own test: `test_speculative_decoding` passes on right code, whoever
    wrote it, and fails on each of the slips listed below.
11.11 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one,
    for each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    verify    For i = 0, 1, …: draft token x of row i is accepted with probability min(1, p/q), p
              and q those of x in row i of target_probs and draft_probs. At the first rejection one
              last token comes from (p - q)+ = max(0, p - q) of row i, divided by its sum; the rest
              is dropped. If all k are accepted, the last token, the bonus, comes from target row k.
    a round   r tokens are still to come.
              1. The draft proposes min(num_draft_tokens, r - 1) tokens, fewer if one of them is
                 eos_token_id, which ends the proposing. Before each it is fed what it has not been
                 fed yet: the prompt or the last tokens at first, then the token just proposed.
              2. The target is fed what it has not been fed yet (the prompt, or the last token) and
                 all proposed tokens. If there are none (r = 1), the draft is not called; verify is.
              3. verify. Rejected tokens are rewound. Tokens that are kept are never fed again.
    rounds = target calls
    proposed = draft calls
    accepted = proposed tokens that are in the output
    acceptance_rate = accepted / proposed, 0 if nothing was proposed
    expected_speedup = (1 + a + a² + … + aᵏ) / (k · draft_cost + 1)
                     = tokens per round, if each proposed token is accepted with probability a, by
                       the cost of a round; a target call costs 1, a draft call draft_cost

Shapes
    V tokens of the vocabulary; T tokens that are fed; k proposed tokens
    logits [T, V] of `feed`; draft_probs [k, V]; target_probs [k + 1, V], both float64

By hand
    logits = log [1/2, 1/4, 1/8, 1/8]
      temperature 1/2 squares:  [16, 4, 1, 1] / 22
      top_p 0.8:                1/2 + 1/4 = 0.75 is too little, 0.875 is enough: [4, 2, 1, 0] / 7
      both:                     16/22 = 0.727, and 20/22 = 0.909 is enough: [0.8, 0.2, 0, 0]

    verify, k = 1, q = [3/4, 1/4, 0], p = [1/4, 1/2, 1/4]
      draft token 0   accepted with 1/3; else [0, 1/4, 1/4] divided by 1/2: token 1 or 2, 1/2 each
      draft token 1   accepted with min(1, 2) = 1
      first token     0: 3/4 · 1/3 = 1/4     1: 1/4 + 3/4 · 2/3 · 1/2 = 1/2     2: 1/4, which is p

    prompt 7 8, num_draft_tokens 2, 6 new tokens; the target goes on 1 2 3 4 5 6, the draft says 9
    after 3 and 0 after 9
      round   r   draft is fed     proposes   target is fed   gives    then fed: target   draft
      1       6   7 8, then 1      1 2        7 8 1 2         1 2 3    7 8 1 2            7 8 1
      2       3   2 3, then 9      9 0        3 9 0           4        … 3                … 3
      3       2   4                5          4 5             5 6
      rounds 3, proposed 5, accepted 3, acceptance rate 0.6
    expected_speedup(0.5, 2, 0.25) = 1.75 / 1.5 = 1.1667

Conventions
- A model has what `Decoder` has: vocab_size, num_layers, num_heads, num_kv_heads, head_dim, at
  least one parameter, whose dtype and device are the model's, and the same call. Each layer calls
  attend once, from layer 0 up, with tensors that are yours to keep. Nothing else of it is relied
  upon. Draft and target may be one object.
- Temperature and top_p hold for the draft too. Its tokens are judged by what they were drawn from.
- `draw` and `verify` return Python integers, and so does `tokens`.
- You may take the numbers of uniform in any order, and leave out those of decisions that are
  certain: the law counts.
- Prompts are lists or tuples. Inputs are never written to, not even to be restored.
- Weights may change between calls, in place, by loading or by a cast; the next call uses the new
  ones. A call that failed leaves nothing behind.
- Tensors that you make are on the model's device.
- How near, times 1 + |right value|: float64 1e-9, float32 2e-5. What comes with probability 0 has
  exactly 0.
- A submission is one file on torch and the standard library.

Not defined
- NaN anywhere; +inf or a row of -inf in logits; what rounding decides (does a sum reach top_p, is a
  model's logit the largest); a temperature in (0, 1e-3), or inf; an acceptance rate outside
  0 … 1, or within 1e-6 of 1 without being 1
- a draft token with q = 0; probabilities that miss the sum 1 by more than rounding
- feeding nothing; weights that change, or a switch of inference_mode, once a cache has been fed
- dropout; models that switch gradients on; autograd through your code; two devices at once; copies

Your own test (11.10) runs on other code, right and wrong, in place of your classes and functions.
It may use these as this text has them, the given code, models of its own, torch, Python's library
and helpers in this file. It sets its own seed and takes at most 1 s (one thread; imports and waits
aside). It may not rely on which number of uniform decides what. How to see
- a law: give uniform every sequence of the midpoints 1/8, 3/8, 5/8, 7/8, as many as are asked for;
  counts are exact where probabilities, p/q and residuals by their sum are multiples of 1/4
- the caches: compare with `generate_alone`, on weights whose answers vary, and a draft of others
It has to fail (a hang counts) on code that has, in any of its functions, one of these slips:
- always_accept: every proposed token is accepted
- resample_from_p: after a rejection the token comes from p
- residual_not_normalised: (p - q)+ is not divided by its sum
- no_bonus: nothing follows when all proposed tokens are accepted
- bonus_of_wrong_row: the bonus comes from the row before
- cache_not_rewound: rejected tokens stay in the target's cache
- token_after_eos: tokens behind an accepted EOS are kept
- one_token_too_many: the last round proposes all tokens that are still to come, and one more comes
- draft_drawn_otherwise: the draft draws with neither temperature nor top_p, and is judged with both

Discuss
1. Scale to production: how do you serve many requests at once, which accept different numbers?
2. Limits: when is decoding with a draft slower than without? Which load, batch or text makes it so?
3. Monitoring: which numbers show that a draft no longer fits its target, or that the law is off?
4. Next: what would you optimise next (draft, tree of drafts, kernels); how would you prove it?

Sources
- Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding", sections 2, 3
  and appendix A.1: https://arxiv.org/abs/2211.17192
- Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling",
  algorithm 2: https://arxiv.org/abs/2302.01318
"""

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
        # TODO(11.6): keep the model; nothing is fed yet.
        raise NotImplementedError("TODO 11.6: CachedModel")

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Goes on with a sequence, by one call of the model with these tokens alone.

        Args:
            tokens: the next T of the sequence, T ≥ 1.

        Returns:
            [T, V], the logits of what follows each of them, in the model's dtype.
        """
        # TODO(11.6): let `attend` put the new keys and values behind those of the layer that are there.
        # TODO(11.6): change the cache once the model has returned, not before.
        raise NotImplementedError("TODO 11.6: feed")

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens.

        Raises:
            ValueError: length is below 0 or above the length that there is.
        """
        # TODO(11.6): refuse what is not there; cut the keys and values of every layer.
        raise NotImplementedError("TODO 11.6: rewind")


def token_probabilities(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The probabilities that tokens are drawn with.

    Args:
        logits: [..., V], any floating dtype.
        temperature: 0 for the most probable token, else what the logits are divided by.
        top_p: the sum that the most probable tokens have to reach, in (0, 1]; 1 keeps all.

    Returns:
        float64 [..., V].
    """
    # TODO(11.1): go to float64 first; then temperature, softmax, top_p; temperature 0 for itself.
    raise NotImplementedError("TODO 11.1: token_probabilities")


def draw(probabilities: Tensor, u: float) -> int:
    """The first token whose cumulative probability exceeds u, never one of probability 0.

    Args:
        probabilities: float64 [V].
        u: 0 ≤ u < 1.
    """
    # TODO(11.2): find the first token whose cumulative probability exceeds u.
    # TODO(11.9): where rounding keeps the sum at u or below, give a token that is possible.
    raise NotImplementedError("TODO 11.2: draw")


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
    # TODO(11.2): accept, or correct and stop; after the last accepted token comes the bonus.
    # TODO(11.9): where (p - q)+ is zero everywhere, draw from p.
    raise NotImplementedError("TODO 11.2: verify")


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
    # TODO(11.9): refuse what cannot be, before any model call.
    # TODO(11.3, 11.4, 11.5): go through rounds: propose, one target call, verify, rewind.
    # TODO(11.7): stop with max_new_tokens, or behind eos_token_id.
    # TODO(11.8): count.
    raise NotImplementedError("TODO 11.3: speculative_generate")


def expected_speedup(acceptance_rate: float, num_draft_tokens: int, draft_cost: float) -> float:
    """How many times as fast as the target alone decoding with a draft is expected to be.

    Args:
        acceptance_rate: how probably a proposed token is accepted, 0 … 1.
        num_draft_tokens: tokens that are proposed in each round.
        draft_cost: what a draft call costs, in target calls.
    """
    # TODO(11.8): tokens per round by the cost of a round.
    raise NotImplementedError("TODO 11.8: expected_speedup")


def test_speculative_decoding() -> None:
    """Your own test of speculative decoding: passes on right code, fails on each slip listed above."""
    # TODO(11.10): go through the numbers of uniform for the laws, compare with generate_alone for the rest.
    # TODO(11.11): leave nothing in this file for ruff and mypy to find.
    raise NotImplementedError("TODO 11.10: test_speculative_decoding")
