"""The answer to ex02, Rotary position embedding."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class RotaryPositionEmbedding(nn.Module):
    """Turns pairs of features by angles that grow with the position.

    Args:
        dim: number of features Dh; even.
        max_position_embeddings: how many positions to expect; no limit.
        base: the slowest pair turns by about 1 / base per position.

    Raises:
        ValueError: `dim` is odd; the message names it.
    """

    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        if dim % 2 != 0:
            raise ValueError(f"dim {dim} is odd; features turn in pairs")
        self.dim = dim
        self.base = base
        # Plain attributes: a cast of the module would cast buffers too.
        self._cos, self._sin = self._table(max_position_embeddings, torch.get_default_device())

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        """Turns every row of x according to its position.

        Args:
            x: [B, H, L, Dh].
            seq_len: number of positions up to and including the last row of x; None means L.

        Returns:
            [B, H, L, Dh], of x's dtype.

        Raises:
            ValueError: `seq_len` is less than L; the message names both.
        """
        length = x.size(-2)
        if seq_len is None:
            seq_len = length
        if seq_len < length:
            raise ValueError(f"seq_len {seq_len} is less than the {length} rows of x")
        rows = len(self._cos)
        if seq_len > rows or x.device != self._cos.device:
            # Doubling makes decoding beyond the table cost a few rebuilds, not one per token.
            self._cos, self._sin = self._table(rows if seq_len <= rows else max(seq_len, 2 * rows), x.device)
        positions = slice(seq_len - length, seq_len)
        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])

    def rotate_half(self, x: Tensor) -> Tensor:
        """A quarter turn of every pair: (x1, x2) -> (-x2, x1), where x1 and x2 are the halves of the last dimension.

        Args:
            x: [B, H, L, Dh].

        Returns:
            [B, H, L, Dh].
        """
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((-x2, x1), dim=-1)

    def apply_rotary_pos_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns every pair of x by the angles whose cosines and sines are given.

        Args:
            x: [B, H, L, Dh].
            cos: [L, Dh], float32 or float64; both halves are equal.
            sin: [L, Dh], float32 or float64; both halves are equal.

        Returns:
            [B, H, L, Dh], of x's dtype.
        """
        return (x * cos + self.rotate_half(x) * sin).to(x.dtype)

    @torch.inference_mode(False)  # A table made in inference mode could never serve training.
    def _table(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # In float32 the angle itself would be off by 1e-4 at position 4000, and by 4e-3 at 128k.
        positions = torch.arange(rows, dtype=torch.float64, device=device)
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device) / self.dim
        angles = torch.outer(positions, self.base**-exponents).repeat(1, 2)  # [rows, Dh]
        return angles.cos().float(), angles.sin().float()


class MultiHeadAttentionWithRoPE(nn.Module):
    """Multi-head self-attention whose queries and keys carry their position as a rotation.

    Args:
        d_model: number of features D; a multiple of `num_heads`, with an even quotient.
        num_heads: number of heads H.
        max_position_embeddings: as in RotaryPositionEmbedding.

    Raises:
        ValueError: `d_model` is no multiple of `num_heads`; the message names both numbers. Or their quotient is odd;
            the message names it or `d_model`.
    """

    def __init__(self, d_model: int, num_heads: int, max_position_embeddings: int = 2048) -> None:
        super().__init__()
        if d_model % num_heads != 0:
            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads

        # Given; no need to change.
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends from every position to every position that the mask allows.

        Args:
            x: [B, L, D].
            mask: bool or 0/1, broadcasts to [B, H, L, L]; true or 1 = may attend.

        Returns:
            [B, L, D], of x's dtype.

        Raises:
            ValueError: the mask has not 4 dimensions or does not broadcast to [B, H, L, L]; the message names the
                mask's shape and the scores'.
        """
        scores_shape = (x.size(0), self.num_heads, x.size(1), x.size(1))
        if mask is not None:
            self._check_mask(mask, scores_shape)
            mask = mask.bool()
        q = self.rotary_emb(self._split_heads(self.q_proj(x)))  # [B, H, L, Dh]
        k = self.rotary_emb(self._split_heads(self.k_proj(x)))  # [B, H, L, Dh]
        v = self._split_heads(self.v_proj(x))  # [B, H, L, Dh]
        context = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, L, Dh]
        return self.o_proj(context.transpose(1, 2).flatten(start_dim=2))  # [B, L, D]

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, Dh]

    @staticmethod
    def _check_mask(mask: Tensor, scores_shape: tuple[int, ...]) -> None:
        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, scores_shape, strict=True))
        if not fits:
            raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to the scores' {scores_shape}")


def sinusoidal_position_embedding(seq_len: int, dim: int) -> Tensor:
    """The embedding of "Attention is all you need", which is added to the features.

    Args:
        seq_len: number of positions.
        dim: number of features; even.

    Returns:
        [seq_len, dim], float32 or float64: sines at the even features, cosines at the odd ones.

    Raises:
        ValueError: `dim` is odd; the message names it.
    """
    if dim % 2 != 0:
        raise ValueError(f"dim {dim} is odd; sines and cosines come in pairs")
    frequencies = 10000 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(seq_len), frequencies)  # [seq_len, dim / 2]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(start_dim=1)  # [seq_len, dim]


def compare_position_embeddings(seq_len: int = 64, dim: int = 32, shift: int = 16) -> dict[str, float]:
    """Measures how much a shift of both positions changes the score of a query and a key.

    Args:
        seq_len: number of positions that are compared; at least 1.
        dim: number of features; even.
        shift: by how many positions both move; at least 1.

    Returns:
        {"rope": ..., "sinusoidal": ...}: the largest absolute change of the dot product over all pairs of positions.
    """
    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    rows = seq_len + shift
    rope = RotaryPositionEmbedding(dim, rows)
    turned_query, turned_key = rope(query.expand(1, 1, rows, dim)), rope(key.expand(1, 1, rows, dim))
    added = sinusoidal_position_embedding(rows, dim)
    scores = {
        "rope": (turned_query @ turned_key.mT)[0, 0],  # [rows, rows]
        "sinusoidal": (query + added) @ (key + added).mT,  # [rows, rows]
    }
    return {name: (s[shift:, shift:] - s[:seq_len, :seq_len]).abs().max().item() for name, s in scores.items()}


def test_rope() -> None:
    """Your own test of this file: passes on right code, fails on each slip listed above."""
    torch.manual_seed(0)
    rope = RotaryPositionEmbedding(6, base=100)
    x = torch.randn(2, 3, 5, 6)
    angles = torch.outer(torch.arange(5), 100 ** (-torch.arange(3) / 3))  # [L, Dh / 2]
    turn = torch.polar(torch.ones(5, 3), angles)
    turned = torch.complex(*x.chunk(2, dim=-1)) * turn  # [B, H, L, Dh / 2]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rope(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rope(x[:, :, 3:], seq_len=5), expected[:, :, 3:], atol=1e-5, rtol=1e-5)

    attention = MultiHeadAttentionWithRoPE(12, 3)
    x = 3 * torch.randn(2, 5, 12)
    causal = torch.ones(1, 1, 5, 5).tril()
    q, k, v = (
        project(x).unflatten(-1, (3, 4)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = attention.rotary_emb(q) @ attention.rotary_emb(k).mT / 2
    context = scores.masked_fill(causal == 0, float("-inf")).softmax(dim=-1) @ v
    expected = attention.o_proj(context.transpose(1, 2).flatten(start_dim=2))
    torch.testing.assert_close(attention(x, causal), expected, atol=1e-5, rtol=1e-5)
