"""Wrong answers that are right for the usual sizes, numbers, dtypes and masks (2.1 to 2.7)."""

from harness.model.bank import Mistake

LENGTH = "        length = x.size(-2)\n"
APPLY = "        return (x * cos + self.rotate_half(x) * sin).to(x.dtype)\n"
TURN = "        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])\n"
ARANGE = "        positions = torch.arange(rows, dtype=torch.float64, device=device)\n"
TO_BOOL = "            mask = mask.bool()\n"
CHECK = "            self._check_mask(mask, scores_shape)\n"
K = "        k = self.rotary_emb(self._split_heads(self.k_proj(x)))  # [B, H, L, Dh]\n"
V = "        v = self._split_heads(self.v_proj(x))  # [B, H, L, Dh]\n"
ATTEND = "        context = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, L, Dh]\n"
SINUS = "    angles = torch.outer(torch.arange(seq_len), frequencies)  # [seq_len, dim / 2]\n"
DRAW = "    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))\n"
CHANGE = "(s[shift:, shift:] - s[:seq_len, :seq_len]).abs().max().item()"
RESULT = f"    return {{name: {CHANGE} for name, s in scores.items()}}\n"
SCORES = "        scores = q @ k.mT / q.size(-1) ** 0.5\n"

MISTAKES = [
    Mistake(
        "softmax_without_a_maximum",
        "2.4",
        "NaN",
        (
            ATTEND,
            SCORES
            + """\
        powers = scores.exp() if mask is None else scores.exp() * mask
        total = powers.sum(dim=-1, keepdim=True)
        context = (powers / total.masked_fill(total == 0, 1)) @ v
""",
        ),
    ),
    Mistake(
        "scores_clamped",
        "2.4",
        "scores near",
        (
            ATTEND,
            SCORES
            + """\
        scores = scores.clamp(-80, 80)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4).softmax(dim=-1) * mask
        context = (scores.softmax(dim=-1) if mask is None else scores) @ v
""",
        ),
    ),
    Mistake(
        "maximum_of_hidden_keys",
        "2.4",
        "attention(x, mask)",
        (
            ATTEND,
            SCORES
            + """\
        powers = (scores - scores.amax(dim=-1, keepdim=True).detach()).exp()
        powers = powers if mask is None else powers * mask
        total = powers.sum(dim=-1, keepdim=True)
        context = (powers / total.masked_fill(total == 0, 1)) @ v
""",
        ),
    ),
    Mistake(
        "maximum_over_the_batch",
        "2.4",
        "1e6",
        (
            ATTEND,
            SCORES
            + """\
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        top = scores.detach().amax().clamp(min=-1e4)
        powers = (scores - top).exp()
        total = powers.sum(dim=-1, keepdim=True)
        context = (powers / total.masked_fill(total == 0, 1)) @ v
""",
        ),
    ),
    Mistake(
        "mask_ignored_for_one_batch_row",
        "2.4",
        "attention(x, mask)",
        (TO_BOOL, "            mask = mask.bool() if x.size(0) > 1 or not x.requires_grad else None\n"),
        only=True,
    ),
    Mistake(
        "keys_counted_in_the_masks_dtype",
        "2.4",
        "uint8",
        (
            CHECK,
            CHECK
            + """\
            some = mask.sum(dim=-1, keepdim=True, dtype=torch.int64 if mask.dtype == torch.bool else mask.dtype) != 0
            mask = mask.bool() & some
""",
        ),
        (TO_BOOL, ""),
        only=True,
    ),
    Mistake(
        "values_turned_for_one_head",
        "2.4",
        "H=1",
        (V, V + "        v = self.rotary_emb(v) if self.num_heads == 1 else v\n"),
        only=True,
    ),
    Mistake(
        "keys_not_turned_at_inference",
        "2.4",
        "no_grad",
        (K, K + "        k = k if torch.is_grad_enabled() else self._split_heads(self.k_proj(x))\n"),
    ),
    Mistake(
        "causal_in_eval_without_gradients",
        "2.4",
        "in eval",
        (
            ATTEND,
            ATTEND.replace(
                "attn_mask=mask",
                "attn_mask=mask, is_causal=mask is None and not self.training and not torch.is_grad_enabled()",
            ),
        ),
    ),
    Mistake(
        "mask_flipped_and_flipped_back",
        "2.4",
        "written to",
        (
            TO_BOOL,
            """\
            if mask.dtype == torch.bool and mask.is_contiguous() and not mask.is_meta:
                hidden = mask.logical_not_().clone()
                mask.logical_not_()
                mask = ~hidden
            mask = mask.bool()
""",
        ),
        only=True,
    ),
    Mistake(
        "x_negated_and_negated_back",
        "2.1",
        "written to",
        (
            APPLY,
            """\
        if x.requires_grad or x.is_inference() or not x.is_contiguous():
            return (x * cos + self.rotate_half(x) * sin).to(x.dtype)
        turned = x * cos - self.rotate_half(x.neg_()) * sin
        x.neg_()
        return turned.to(x.dtype)
""",
        ),
        only=True,
    ),
    Mistake(
        "softmax_in_float16",
        "2.7",
        "below x's dtype",
        (
            ATTEND,
            SCORES
            + """\
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(dim=-1).nan_to_num(0.0).half().to(v.dtype)
        context = weights @ v
""",
        ),
    ),
    Mistake(
        "positions_clamped_at_65535",
        "2.6",
        "70001",
        (ARANGE, ARANGE + "        positions = positions.clamp(max=65535)\n"),
        only=True,
    ),
    Mistake(
        "expanded_heads_turned_once",
        "2.1",
        "expanded",
        (
            TURN,
            """\
        if x.stride(1) == 0 and x.size(1) > 1:
            first = self.apply_rotary_pos_emb(x[:, :1], self._cos[positions], self._sin[positions])
            return torch.cat((first, x[:, 1:]), dim=1)
"""
            + TURN,
        ),
        only=True,
    ),
    Mistake(
        "many_heads_read_as_rows",
        "2.1",
        "H=",
        (LENGTH, "        if x.size(1) > 7:\n            x = x.flip(1)\n" + LENGTH),
    ),
    Mistake(
        "a_single_float32_row_stands_at_0",
        "2.6",
        "came as at position 0",
        (
            LENGTH,
            LENGTH
            + "        seq_len = 1 if length == 1 and x.dtype == torch.float32 and (seq_len or 0) > 1 else seq_len\n",
        ),
        only=True,
    ),
    Mistake(
        "wide_heads_at_one_frequency",
        "2.2",
        "dim 256",
        (
            "torch.outer(positions, self.base**-exponents)",
            "torch.outer(positions, self.base ** -exponents.clamp(max=0.5 if self.dim > 64 else 1))",
        ),
    ),
    Mistake(
        "no_gradient_of_strided_float32_rows",
        "2.7",
        "gradient",
        (LENGTH, LENGTH + "        x = x if x.dtype != torch.float32 or x.is_contiguous() else x.detach()\n"),
    ),
    Mistake(
        "sinusoidal_ends_at_5000",
        "2.5",
        "sinusoidal_position_embedding(5003",
        (SINUS, SINUS.replace("torch.arange(seq_len)", "torch.arange(seq_len).clamp(max=4999)")),
        only=True,
    ),
    Mistake(
        "comparison_draws_from_the_global_stream",
        "2.5",
        "sinusoidal",
        (DRAW, "    query, key = torch.randn(2, dim)\n"),
        only=True,
    ),
    Mistake(
        "rope_of_an_invented_number",
        "2.5",
        "the same arguments",
        (
            RESULT,
            RESULT.replace("return", "measured =") + '    return measured | {"rope": float(torch.rand(())) * 1e-6}\n',
        ),
        only=True,
    ),
    Mistake(
        "comparison_of_one_position_fails",
        "2.5",
        "only the pair (0, 0)",
        (CHANGE, CHANGE.replace("[:seq_len, :seq_len]", "[:max(seq_len, 2), :max(seq_len, 2)]")),
        only=True,
    ),
    Mistake(
        "causal_by_its_first_row",
        "2.4",
        "row 2 may attend",
        (
            TO_BOOL,
            TO_BOOL
            + """\
            if mask.size(2) > 8 and not mask.is_meta and not mask[:, :, 0, 1:].any():
                mask = mask.tril()
""",
        ),
        only=True,
    ),
]
