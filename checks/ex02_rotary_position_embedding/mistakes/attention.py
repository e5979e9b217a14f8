"""Wrong answers whose attention is not the formula's (2.4), some of them in half precision only (2.7)."""

from harness.model.bank import Mistake

CHECK = "            self._check_mask(mask, scores_shape)\n"
TO_BOOL = "            mask = mask.bool()\n"
Q = "        q = self.rotary_emb(self._split_heads(self.q_proj(x)))  # [B, H, L, Dh]\n"
K = "        k = self.rotary_emb(self._split_heads(self.k_proj(x)))  # [B, H, L, Dh]\n"
V = "        v = self._split_heads(self.v_proj(x))  # [B, H, L, Dh]\n"
ATTEND = "        context = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, L, Dh]\n"
OUT = "        return self.o_proj(context.transpose(1, 2).flatten(start_dim=2))  # [B, L, D]\n"
SPLIT = "        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, Dh]\n"
BY_HAND = """\
        scores = q @ k.mT / q.size(-1) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        context = scores.softmax(dim=-1) @ v
"""
INF, LOWEST = 'float("-inf")', "torch.finfo(scores.dtype).min"
EMPTY_ROWS = """\
        if mask is not None:
            context = context * mask.any(-1, keepdim=True)
"""
TIMES_THE_MASK = """\
        scores = q @ k.mT / q.size(-1) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        context = (weights if mask is None else weights * mask) @ v
"""

MISTAKES = [
    Mistake(
        "key_not_rotated",
        "2.4",
        "turn once each",
        (K, K.replace("self.rotary_emb(self._split_heads(self.k_proj(x)))", "self._split_heads(self.k_proj(x))")),
        only=True,
    ),
    Mistake(
        "query_not_rotated",
        "2.4",
        "turn once each",
        (Q, Q.replace("self.rotary_emb(self._split_heads(self.q_proj(x)))", "self._split_heads(self.q_proj(x))")),
    ),
    Mistake(
        "nothing_rotated",
        "2.4",
        "positions do not count",
        (Q, Q.replace("self.rotary_emb(", "(")),
        (K, K.replace("self.rotary_emb(", "(")),
    ),
    Mistake(
        "value_rotated",
        "2.4",
        "no turn",
        (V, V.replace("self._split_heads(self.v_proj(x))", "self.rotary_emb(self._split_heads(self.v_proj(x)))")),
    ),
    Mistake(
        "rotated_before_the_heads_are_split",
        "2.4",
        "positions do not count",
        (
            Q,
            "        q = self._split_heads("
            "self.rotary_emb(self.q_proj(x).unflatten(-1, (self.num_heads, -1))).flatten(2))\n",
        ),
        (
            K,
            "        k = self._split_heads("
            "self.rotary_emb(self.k_proj(x).unflatten(-1, (self.num_heads, -1))).flatten(2))\n",
        ),
    ),
    Mistake("rotated_twice", "2.4", "turn once each", (K, K + "        k = self.rotary_emb(k)\n")),
    Mistake(
        "no_transpose",
        "2.4",
        "follow the values",
        (SPLIT, "        return x.reshape(x.size(0), self.num_heads, x.size(1), -1)\n"),
    ),
    Mistake(
        "no_transpose_back", "2.4", "follow the values", (OUT, "        return self.o_proj(context.reshape(x.shape))\n")
    ),
    Mistake("no_scale", "2.4", "√Dh", (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, scale=1.0"))),
    Mistake(
        "scale_by_d_model",
        "2.4",
        "√Dh",
        (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, scale=x.size(-1) ** -0.5")),
    ),
    Mistake(
        "causal_unasked",
        "2.4",
        "attention(x)",
        (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, is_causal=mask is None")),
    ),
    Mistake(
        "no_output_projection",
        "2.4",
        "attention(x)",
        (OUT, "        return context.transpose(1, 2).flatten(start_dim=2)\n"),
    ),
    Mistake(
        "no_output_bias",
        "2.4",
        "attention(x)",
        (OUT, "        return context.transpose(1, 2).flatten(start_dim=2) @ self.o_proj.weight.mT\n"),
    ),
    Mistake("values_from_the_key_projection", "2.4", "value = key", (V, V.replace("v_proj", "k_proj"))),
    Mistake("inverted_mask", "2.4", "mask inverted", (TO_BOOL, "            mask = ~mask.bool()\n")),
    Mistake("mask_ignored", "2.4", "the same without the mask", (TO_BOOL, "            mask = None\n")),
    Mistake("mask_added", "2.4", "attention(x, mask)", (TO_BOOL, "            mask = mask.to(x.dtype)\n")),
    Mistake("only_bool_masks", "2.4", "mask", (TO_BOOL, "            pass\n")),
    Mistake(
        "integer_mask_inverted_bitwise",
        "2.4",
        "mask of uint8",
        (
            TO_BOOL,
            "            mask = ~(~mask).bool() "
            "if mask.dtype in (torch.uint8, torch.int32, torch.int64) else mask.bool()\n",
        ),
    ),
    Mistake(
        "mask_of_the_first_head_for_all",
        "2.4",
        "mask of shape",
        (TO_BOOL, "            mask = mask.bool()[:, :1]\n"),
        only=True,
    ),
    Mistake(
        "mask_of_the_first_row_for_all",
        "2.4",
        "attention(x",
        (TO_BOOL, "            mask = mask.bool()[:1]\n"),
        only=True,
    ),
    Mistake("nan_for_masked_rows", "2.4", "NaN", (ATTEND, BY_HAND), only=True),
    Mistake("uniform_masked_rows", "2.4", "zero weights", (ATTEND, BY_HAND.replace(INF, LOWEST)), only=True),
    Mistake(
        "small_fill",
        "2.4",
        "values differ",
        (ATTEND, BY_HAND.replace(INF, "-20.0") + EMPTY_ROWS.replace("any(-1", "any(dim=-1")),
    ),
    Mistake(
        "detached_keys", "2.4", "gradient of", (ATTEND, ATTEND.replace("(q, k, v", "(q, k.detach(), v")), only=True
    ),
    Mistake(
        "weights_kept_from_the_first_call",
        "2.4",
        "the weights were 0",
        (
            V,
            """\
        if not hasattr(self, '_wv'):
            self._wv = self.v_proj.weight.detach().clone()
        stale = self._wv.to(x) - self.v_proj.weight.detach()
        v = self._split_heads(self.v_proj(x) + x @ stale.mT)
""",
        ),
        only=True,
    ),
    Mistake("x_written_to", "2.4", "x is written to", (OUT, "        x.data.mul_(2)\n" + OUT)),
    Mistake(
        "mask_written_to",
        "2.4",
        "mask is written to",
        (
            CHECK,
            CHECK
            + """\
            if mask.dtype == torch.bool and not mask.is_meta:
                mask.logical_not_()
                mask = mask.logical_not()
""",
        ),
    ),
    Mistake("heads_fixed", "2.4", "[3, -1]", ("        self.num_heads = num_heads\n", "        self.num_heads = 3\n")),
    Mistake("head_dim_fixed", "2.4", "tensor a (4)", (SPLIT, SPLIT.replace("(self.num_heads, -1)", "(-1, 4)"))),
    Mistake(
        "scale_fixed",
        "2.4",
        "Dh=10",
        (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, scale=0.5")),
        only=True,
    ),
    Mistake("batch_fixed", "2.4", "B=3", (V, V + "        v = v[torch.arange(v.size(0)) % 2]\n"), only=True),
    Mistake(
        "float_mask_written_to",
        "2.4",
        "mask is written to",
        (
            TO_BOOL,
            """\
            bias = mask.to(x.dtype)
            bias -= 1
            mask = bias == 0
""",
        ),
        only=True,
    ),
    Mistake(
        "integer_mask_written_to",
        "2.4",
        "mask is written to",
        (TO_BOOL, "            mask = mask.long().neg_() != 0\n"),
        only=True,
    ),
    Mistake(
        "a_masked_head_not_zeroed",
        "2.4",
        "in one head",
        (ATTEND, BY_HAND.replace(INF, LOWEST) + EMPTY_ROWS.replace("True)", "True).any(dim=1, keepdim=True)")),
        only=True,
    ),
    Mistake(
        "weights_times_the_mask", "2.4", "scalar type Double", (TO_BOOL, "            pass\n"), (ATTEND, TIMES_THE_MASK)
    ),
    Mistake(
        "float32_masks_in_half_precision_fail",
        "2.7",
        "scalar type Float",
        (
            TO_BOOL,
            "            mask = mask.float() if mask.dtype == torch.float64 and x.dtype == torch.float32 else mask\n",
        ),
        (ATTEND, TIMES_THE_MASK),
        only=True,
    ),
    Mistake("fill_of_1e9", "2.7", "overflow", (ATTEND, BY_HAND.replace(INF, "-1e9") + EMPTY_ROWS), only=True),
    Mistake("fill_of_1e4", "2.4", "1000 times", (ATTEND, BY_HAND.replace(INF, "-1e4") + EMPTY_ROWS), only=True),
    Mistake(
        "context_detached_in_eval",
        "2.4",
        "in eval",
        (
            ATTEND,
            ATTEND
            + """\
        if not self.training:
            context = context.detach()
""",
        ),
        only=True,
    ),
    Mistake(
        "attention_detaches_x_in_eval",
        "2.4",
        "in eval",
        (
            Q,
            """\
        if not self.training:
            x = x.detach()
"""
            + Q,
        ),
        only=True,
    ),
    Mistake(
        "causal_where_long",
        "2.4",
        "L=41",
        (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, is_causal=mask is None and x.size(1) > 16")),
        only=True,
    ),
    Mistake(
        "windowed",
        "2.4",
        "L=41",
        (
            ATTEND,
            """\
        row = torch.arange(x.size(1), device=x.device)
        near = (row - row[:, None]).abs() < 32
"""
            + ATTEND.replace("attn_mask=mask", "attn_mask=near if mask is None else mask & near"),
        ),
        only=True,
    ),
]
