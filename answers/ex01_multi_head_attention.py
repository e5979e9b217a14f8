"""The answer to ex01, Multi-head attention."""

import torch
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Multi-head attention with separate projections for query, key, value and output.

    Args:
        d_model: number of features D; a multiple of `num_heads`.
        num_heads: number of heads H.
        dropout: probability that an attention weight is dropped in training.

    Raises:
        ValueError: `d_model` is no multiple of `num_heads`; the message names both numbers.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        if d_model % num_heads != 0:
            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads

        # Given; no need to change.
        self.q_linear = nn.Linear(d_model, d_model)
        self.k_linear = nn.Linear(d_model, d_model)
        self.v_linear = nn.Linear(d_model, d_model)
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attends from every query to every key that the mask allows.

        Args:
            query: [B, Lq, D].
            key: [B, Lk, D].
            value: [B, Lk, D].
            mask: boolean or 0/1, 4 dimensions, broadcasts to [B, H, Lq, Lk]; true or 1 means "may attend".

        Returns:
            The output [B, Lq, D] and the weights after dropout [B, H, Lq, Lk].

        Raises:
            ValueError: the mask has not 4 dimensions or does not broadcast to [B, H, Lq, Lk]; the message names the
                mask's shape and the scores'.
        """
        scores_shape = (query.size(0), self.num_heads, query.size(1), key.size(1))
        if mask is not None:
            self._check_mask(mask, scores_shape)
        q = self._split_heads(self.q_linear(query))  # [B, H, Lq, Dh]
        k = self._split_heads(self.k_linear(key))  # [B, H, Lk, Dh]
        v = self._split_heads(self.v_linear(value))  # [B, H, Lk, Dh]

        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]
        if mask is not None:
            scores = self.apply_mask(scores, mask)
        weights = scores.softmax(dim=-1)
        if mask is not None:
            # A row without any allowed key is uniform after the softmax; everywhere else this changes nothing.
            weights = weights * mask.bool()
        weights = self.dropout(weights)

        context = weights @ v  # [B, H, Lq, Dh]
        joined = context.transpose(1, 2).flatten(start_dim=2)  # [B, Lq, D]
        return self.output_linear(joined), weights

    def compute_attention_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """The scores q kᵀ / √Dh of every query with every key.

        Args:
            q: [B, H, Lq, Dh].
            k: [B, H, Lk, Dh].

        Returns:
            [B, H, Lq, Lk].
        """
        # Scaling the factors, not the product, keeps float16 away from its largest number, 65504.
        scale = q.size(-1) ** -0.25
        return (q * scale) @ (k * scale).mT

    def apply_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Makes masked scores so low that a softmax in their dtype gives exactly 0; leaves the others.

        Args:
            scores: [B, H, Lq, Lk]; may be written to.
            mask: a valid mask, as in forward.

        Returns:
            [B, H, Lq, Lk], in the scores' dtype.
        """
        return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, Dh]

    @staticmethod
    def _check_mask(mask: Tensor, scores_shape: tuple[int, ...]) -> None:
        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, scores_shape, strict=True))
        if not fits:
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to the scores' {scores_shape}")


def test_multihead_attention() -> None:
    """Your own test of MultiHeadAttention: passes on right code, fails on each slip listed above."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(12, 3, dropout=0.5).eval()
    query, key, value = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[0, ..., 4:] = False
    reference = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        projections = (attention.q_linear, attention.k_linear, attention.v_linear)
        reference.in_proj_weight.copy_(torch.cat([linear.weight for linear in projections]))
        reference.in_proj_bias.copy_(torch.cat([linear.bias for linear in projections]))
        reference.out_proj.load_state_dict(attention.output_linear.state_dict())

    output, weights = attention(query, key, value, mask)
    padding = ~mask[:, 0, 0]
    expected = reference(query, key, value, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close((output, weights), expected, atol=1e-5, rtol=1e-5)

    nothing_allowed = torch.zeros(2, 1, 5, 7)
    output, weights = attention(query, key, value, nothing_allowed)
    assert weights.eq(0).all(), "a fully masked row attends to something"
    torch.testing.assert_close(output, attention.output_linear.bias.expand(2, 5, 12))
