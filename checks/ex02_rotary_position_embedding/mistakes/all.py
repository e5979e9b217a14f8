"""Wrong answers to ex02 that its checks must catch."""

from harness.model.bank import Mistake as _New


def Mistake(name, caught_by, edits, says, only=False):  # type: ignore
    return _New(name, caught_by, says, *edits, only=only)


ODD = '        if dim % 2 != 0:\n            raise ValueError(f"dim {dim} is odd; features turn in pairs")\n'
INIT = "        self._cos, self._sin = self._table(max_position_embeddings, torch.get_default_device())\n"
LENGTH = "        length = x.size(-2)\n"
NONE = "        if seq_len is None:\n"
SMALL = (
    "        if seq_len < length:\n"
    '            raise ValueError(f"seq_len {seq_len} is less than the {length} rows of x")\n'
)
STALE = "        if seq_len > rows or x.device != self._cos.device:\n"
GROW = "            self._cos, self._sin = self._table(rows if seq_len <= rows else max(seq_len, 2 * rows), x.device)\n"
POSITIONS = "        positions = slice(seq_len - length, seq_len)\n"
TURN = "        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])\n"
HALF = "        x1, x2 = x.chunk(2, dim=-1)\n        return torch.cat((-x2, x1), dim=-1)\n"
APPLY = "        return (x * cos + self.rotate_half(x) * sin).to(x.dtype)\n"
NO_INFERENCE = "    @torch.inference_mode(False)  # A table made in inference mode could never serve training.\n"
ARANGE = "        positions = torch.arange(rows, dtype=torch.float64, device=device)\n"
EXPONENTS = "        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device) / self.dim\n"
ANGLES = "        angles = torch.outer(positions, self.base**-exponents).repeat(1, 2)  # [rows, Dh]\n"
TABLE = "        return angles.cos().float(), angles.sin().float()\n"
BAD_D_MODEL = "        if d_model % num_heads != 0:\n"
CHECK = "            self._check_mask(mask, scores_shape)\n"
TO_BOOL = "            mask = mask.bool()\n"
Q = "        q = self.rotary_emb(self._split_heads(self.q_proj(x)))  # [B, H, L, Dh]\n"
K = "        k = self.rotary_emb(self._split_heads(self.k_proj(x)))  # [B, H, L, Dh]\n"
V = "        v = self._split_heads(self.v_proj(x))  # [B, H, L, Dh]\n"
ATTEND = "        context = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, L, Dh]\n"
OUT = "        return self.o_proj(context.transpose(1, 2).flatten(start_dim=2))  # [B, L, D]\n"
SPLIT = "        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, Dh]\n"
FITS = (
    "        fits = mask.dim() == 4 and "
    "all(size in (1, full) for size, full in zip(mask.shape, scores_shape, strict=True))\n"
)
ODD_SINUS = '    if dim % 2 != 0:\n        raise ValueError(f"dim {dim} is odd; sines and cosines come in pairs")\n'
FREQUENCIES = "    frequencies = 10000 ** (-torch.arange(0, dim, 2) / dim)\n"
SINUS = "    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(start_dim=1)  # [seq_len, dim]\n"
DRAW = "    query, key = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))\n"
TURNED = "    turned_query, turned_key = rope(query.expand(1, 1, rows, dim)), rope(key.expand(1, 1, rows, dim))\n"
CHANGE = "(s[shift:, shift:] - s[:seq_len, :seq_len]).abs().max().item()"
OWN = "    torch.manual_seed(0)\n    rope = RotaryPositionEmbedding(6, base=100)\n"
OWN_SEQ_LEN = "    torch.testing.assert_close(rope(x[:, :, 3:], seq_len=5), expected[:, :, 3:], atol=1e-5, rtol=1e-5)\n"
OWN_SPLIT = "        project(x).unflatten(-1, (3, 4)).transpose(1, 2)\n"


def wrong(
    name: str, caught_by: str | tuple[str, ...], says: str, *edits: tuple[str, str], only: bool = False
) -> Mistake:
    """A mistake in one line."""
    return Mistake(name, caught_by, edits, says, only)


def keeping(condition: str, table: str = "self._table(seq_len, x.device)", then: str = "") -> list[tuple[str, str]]:
    """Edits that make a new table whenever `condition` holds, in place of whenever it is too short."""
    return [
        (STALE, f"        if {condition}:\n"),
        (GROW, f"            self._cos, self._sin = {table}\n{then}"),
        (INIT, INIT + "        self._seen: tuple = ()\n        self._cache: dict = {}\n"),
    ]


MISTAKES = [
    # Nothing at all.
    wrong("zeros", ("2.1", "2.2", "2.3", "2.6", "2.7"), "position 0", (TURN, "        return torch.zeros_like(x)\n")),
    wrong("none", "2.1", "None came", (TURN, TURN.replace("return ", ""))),
    wrong("attention_gives_x", "2.4", "attention(x)", (OUT, "        return x\n")),
    # 2.1
    wrong("identity", ("2.1", "2.2", "2.3", "2.6", "2.7"), "no turn", (TURN, "        return x\n")),
    wrong(
        "sin_and_cos_swapped",
        "2.1",
        "cos 0 = 1",
        (TURN, "        return self.apply_rotary_pos_emb(x, self._sin[positions], self._cos[positions])\n"),
    ),
    wrong(
        "other_direction",
        "2.1",
        "other direction",
        (TURN, "        return self.apply_rotary_pos_emb(x, self._cos[positions], -self._sin[positions])\n"),
    ),
    wrong(
        "apply_turns_back", "2.1", "counter-clockwise", (APPLY, APPLY.replace("+ self.rotate_half", "- self.rotate_half"))
    ),
    wrong(
        "rotate_half_of_the_other_sign",
        "2.1",
        "(-x2, x1)",
        (HALF, HALF.replace("(-x2, x1)", "(x2, -x1)")),
        (APPLY, APPLY.replace("+ self.rotate_half", "- self.rotate_half")),
        only=True,
    ),
    wrong(
        "interleaved_pairs",
        "2.1",
        "halves of the last dimension",
        (HALF, "        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(start_dim=-2)\n"),
    ),
    wrong(
        "interleaved_in_forward",
        "2.1",
        "paired with i + dim/2",
        (
            TURN,
            "        order = torch.arange(self.dim, device=x.device).unflatten(0, (-1, 2)).mT.flatten()\n"
            "        x = self.apply_rotary_pos_emb(x[..., order], self._cos[positions], self._sin[positions])\n"
            "        return x[..., order.argsort()]\n",
        ),
    ),
    wrong(
        "rotate_half_without_a_sign",
        "2.1",
        "(-x2, x1)",
        (HALF, HALF.replace("(-x2, x1)", "(x2, x1)")),
    ),
    wrong("positions_from_one", "2.1", "positions count from 0", (ARANGE, ARANGE.replace("arange(rows", "arange(1, rows + 1"))),
    wrong(
        "positions_over_heads",
        "2.1",
        "not along the heads",
        (LENGTH, "        x = x.transpose(1, 2)\n" + LENGTH),
        (
            TURN,
            "        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions]).transpose(1, 2)\n",
        ),
    ),
    wrong(
        "positions_over_the_batch",
        "2.1",
        "forward(x)[1, 0]",
        (
            TURN,
            "        x = x + torch.zeros_like(x)\n"
            "        for row, first in enumerate(range(seq_len - length, seq_len - length + len(x))):\n"
            "            cos, sin = self._table(first + length, x.device)\n"
            "            x[row] = self.apply_rotary_pos_emb(x[row : row + 1], cos[first:], sin[first:])[0]\n"
            "        return x\n",
        ),
    ),
    wrong(
        "views_only",
        "2.1",
        "view",
        (HALF, "        x1, x2 = x.view(*x.shape[:-1], 2, -1).unbind(-2)\n        return torch.cat((-x2, x1), dim=-1)\n"),
        (LENGTH, "        x.view(-1)\n" + LENGTH),
    ),
    wrong(
        "x_turned_in_place",
        "2.1",
        "x is written to",
        (APPLY, "        turned = (x * cos + self.rotate_half(x) * sin).to(x.dtype)\n        x.data.copy_(turned)\n        return turned\n"),
    ),
    wrong(
        "sin_negated_in_place",
        "2.1",
        "sin is written to",
        (
            APPLY,
            "        half = x.size(-1) // 2\n"
            "        swapped = x.roll(half, dims=-1)\n"
            "        sin[:, :half].neg_()\n"
            "        return (x * cos + swapped * sin).to(x.dtype)\n",
        ),
        (TURN, TURN.replace("self._sin[positions]", "self._sin[positions].clone()")),
        only=True,
    ),
    wrong("near_miss_of_1e_4", "2.1", "tolerance 2e-05", (TABLE, "        return (angles + 1e-4 * positions[:, None]).cos().float(), angles.sin().float()\n")),
    wrong("table_in_float16", "2.1", "values differ", (TABLE, "        return angles.cos().half().float(), angles.sin().half().float()\n")),
    wrong(
        "norm_not_kept",
        "2.1",
        "values differ",
        (APPLY, "        return ((x * cos + self.rotate_half(x) * sin) / (1 + x.size(-1) // 10)).to(x.dtype)\n"),
    ),
    wrong("x_written_to_without_gradients", "2.1", "x is written to",
          (TURN, "        if not torch.is_grad_enabled() and x.dtype == torch.float32 and not x.is_inference():\n"
                 "            return x.copy_(self.apply_rotary_pos_emb(x.clone(), self._cos[positions], self._sin[positions]))\n" + TURN), only=True),
    # 2.2
    wrong("one_frequency", "2.2", "base**(-2i/dim)", (EXPONENTS, EXPONENTS.replace(") / self.dim", ") * 0"))),
    wrong("exponent_halved", "2.2", "base**(-2i/dim)", (EXPONENTS, EXPONENTS.replace(") / self.dim", ") / (2 * self.dim)"))),
    wrong("exponent_doubled", "2.2", "base**(-2i/dim)", (EXPONENTS, EXPONENTS.replace(") / self.dim", ") / (self.dim // 2)"))),
    wrong("exponent_of_the_other_sign", "2.2", "base**(-2i/dim)", (ANGLES, ANGLES.replace("self.base**-exponents", "self.base**exponents"))),
    wrong("exponents_from_one", "2.2", "base**(-2i/dim)", (EXPONENTS, EXPONENTS.replace("arange(0, self.dim, 2,", "arange(2, self.dim + 2, 2,"))),
    wrong("linear_frequencies", "2.2", "base**(-2i/dim)", (ANGLES, ANGLES.replace("self.base**-exponents", "1 - exponents"))),
    wrong(
        "frequency_per_component",
        "2.2",
        "base**(-2i/dim)",
        (EXPONENTS, EXPONENTS.replace("arange(0, self.dim, 2,", "arange(0, self.dim, 1,")),
        (ANGLES, ANGLES.replace(".repeat(1, 2)", "")),
    ),
    wrong("base_ignored", "2.2", "base 100:", ("        self.base = base\n", "        self.base = 10000\n"), only=True),
    wrong("base_of_the_first_module", "2.2", "base 500000", ("        self.base = base\n", "        self.base = min(base, 10000)\n"), only=True),
    wrong("exponents_clamped", "2.2", "dim 34", (ANGLES, ANGLES.replace("self.base**-exponents", "self.base ** -exponents.clamp(max=0.88)")), only=True),
    # 2.3
    wrong("table_rebuilt_on_every_call", "2.3", "computes cos", (STALE, "        if True:\n"), only=True),
    wrong(
        "rebuilt_by_complex_exponentials",
        "2.3",
        "computes exp",
        (STALE, "        if True:\n"),
        (TABLE, "        z = torch.exp(1j * angles)\n        return z.real.float(), z.imag.float()\n"),
        only=True,
    ),
    wrong(
        "rebuilt_by_polar",
        "2.3",
        "computes polar",
        (STALE, "        if True:\n"),
        (TABLE, "        z = torch.polar(torch.ones_like(angles), angles)\n        return z.real.float(), z.imag.float()\n"),
        only=True,
    ),
    wrong(
        "rebuilt_by_powers",
        "2.3",
        "pow (",
        (STALE, "        if True:\n"),
        (
            TABLE,
            "        z = torch.polar(torch.ones_like(angles[:2]), angles[:2])[-1:] ** positions[:, None]\n"
            "        return z.real.float(), z.imag.float()\n",
        ),
        (INIT, INIT.replace("self._table(max_position_embeddings", "self._table(2 + max_position_embeddings")),
        only=True,
    ),
    wrong(
        "rebuilt_by_python",
        "2.3",
        "math.cos",
        (STALE, "        if True:\n"),
        (
            TABLE,
            "        import math\n\n"
            "        pairs = [self.base ** (-2 * i / self.dim) for i in range(self.dim // 2)] * 2\n"
            "        cos = [[math.cos(p * f) for f in pairs] for p in range(rows)]\n"
            "        sin = [[math.sin(p * f) for f in pairs] for p in range(rows)]\n"
            "        return torch.tensor(cos, device=device), torch.tensor(sin, device=device)\n",
        ),
        (INIT, INIT.replace("self._table(max_position_embeddings", "self._table(0")),
        (GROW, "            self._cos, self._sin = self._table(seq_len, x.device)\n"),
        only=True,
    ),
    wrong(
        "in_place_cosines_on_every_call",
        "2.3",
        "computes cos",
        (STALE, "        if True:\n"),
        (TABLE, "        return angles.clone().cos_().float(), angles.sin_().float()\n"),
        only=True,
    ),
    wrong("rebuilt_for_another_length", "2.3", "computes cos", *keeping("seq_len != len(self._cos) or x.device != self._cos.device"), only=True),
    wrong(
        "a_table_per_length",
        "2.3",
        "computes cos",
        *keeping(
            "True",
            "self._cache.get((seq_len, x.device)) or self._table(seq_len, x.device)",
            "            self._cache[seq_len, x.device] = self._cos, self._sin\n",
        ),
        only=True,
    ),
    wrong(
        "a_table_per_dtype",
        "2.3",
        "computes cos",
        *keeping(
            "seq_len > rows or self._seen != (x.device, x.dtype)",
            "self._table(max(rows, seq_len), x.device)",
            "            self._seen = (x.device, x.dtype)\n",
        ),
        only=True,
    ),
    wrong(
        "a_table_per_shape",
        "2.3",
        "another batch size",
        *keeping(
            "seq_len > rows or self._seen != (x.device, x.size(0), x.size(1))",
            "self._table(max(rows, seq_len), x.device)",
            "            self._seen = (x.device, x.size(0), x.size(1))\n",
        ),
        only=True,
    ),
    wrong(
        "nothing_kept_at_inference",
        "2.3",
        "inference_mode",
        (STALE, "        if seq_len > rows or x.device != self._cos.device or torch.is_inference_mode_enabled():\n"),
        only=True,
    ),
    wrong(
        "not_kept_beyond_the_expected",
        "2.3",
        "computes cos",
        (STALE, "        if x.device != self._cos.device:\n"),
        (GROW, "            self._cos, self._sin = self._table(rows, x.device)\n"),
        (
            TURN,
            "        cos, sin = (self._cos, self._sin) if seq_len <= rows else self._table(seq_len, x.device)\n"
            "        return self.apply_rotary_pos_emb(x, cos[positions], sin[positions])\n",
        ),
        only=True,
    ),
    wrong(
        "only_the_rows_of_the_call_kept",
        "2.3",
        "computes cos",
        *keeping(
            "self._seen != (seq_len - length, seq_len, x.device)",
            then="            self._seen = (seq_len - length, seq_len, x.device)\n",
        ),
        only=True,
    ),
    wrong(
        "cache_keyed_on_length_only",
        "2.3",
        "table in x's dtype",
        *keeping(
            "True",
            "self._cache.get(seq_len) or tuple(t.to(x.dtype) for t in self._table(seq_len, x.device))",
            "            self._cache[seq_len] = self._cos, self._sin\n",
        ),
    ),
    wrong(
        "table_in_the_first_dtype",
        "2.3",
        "table in x's dtype",
        (TURN, "        self._cos, self._sin = self._cos.to(x.dtype), self._sin.to(x.dtype)\n" + TURN),
    ),
    wrong("table_left_on_the_first_device", "2.3", "meta", (STALE, "        if seq_len > rows:\n"), only=True),
    wrong(
        "table_moved_only_when_it_grows",
        "2.3",
        "meta",
        (STALE, "        if seq_len > rows or not rows:\n"),
        (INIT, "        self._cos = self._sin = torch.empty(0, dim)\n"),
        only=True,
    ),
    wrong(
        "cache_shared_between_devices",
        "2.3",
        "meta",
        (GROW, "            self._cos, self._sin = _shared(self, max(seq_len, rows), x.device)\n"),
        (STALE, "        if seq_len > rows:\n"),
        (INIT, "        self._cos = self._sin = torch.empty(0, dim)\n"),
        (
            "class RotaryPositionEmbedding(nn.Module):\n",
            "SHARED: dict = {}\n\n\ndef _shared(rope, rows, device):\n"
            "    key = (rows, rope.dim, rope.base)\n"
            "    if key not in SHARED:\n        SHARED[key] = rope._table(rows, device)\n    return SHARED[key]\n\n\n"
            "class RotaryPositionEmbedding(nn.Module):\n",
        ),
        only=True,
    ),
    wrong(
        "cache_shared_between_bases",
        "2.3",
        "shared",
        (GROW, "            self._cos, self._sin = _shared(self, max(seq_len, rows), x.device)\n"),
        (INIT, "        self._cos = self._sin = torch.empty(0, dim)\n"),
        (
            "class RotaryPositionEmbedding(nn.Module):\n",
            "SHARED: dict = {}\n\n\ndef _shared(rope, rows, device):\n"
            "    key = (rows, rope.dim, device)\n"
            "    if key not in SHARED:\n        SHARED[key] = rope._table(rows, device)\n    return SHARED[key]\n\n\n"
            "class RotaryPositionEmbedding(nn.Module):\n",
        ),
        only=True,
    ),
    wrong(
        "new_rows_start_at_position_0",
        "2.3",
        "has served",
        (
            GROW,
            "            cos, sin = self._table(seq_len - rows if x.device == self._cos.device else seq_len, x.device)\n"
            "            if x.device == self._cos.device:\n"
            "                cos, sin = torch.cat((self._cos, cos)), torch.cat((self._sin, sin))\n"
            "            self._cos, self._sin = cos, sin\n",
        ),
    ),
    wrong(
        "persistent_tables",
        "2.3",
        "state_dict",
        (INIT, INIT + '        self.register_buffer("table", torch.stack((self._cos, self._sin)))\n'),
        only=True,
    ),
    wrong(
        "longest_length_in_the_state",
        "2.3",
        "state_dict",
        (INIT, INIT + '        self.register_buffer("longest", torch.tensor(0))\n'),
        (TURN, "        self.longest = torch.maximum(self.longest, torch.tensor(seq_len, device=x.device))\n" + TURN),
        only=True,
    ),
    wrong(
        "attention_makes_its_rotation_anew",
        "2.3",
        "attention(7 rows)",
        (Q, "        self.rotary_emb = RotaryPositionEmbedding(x.size(-1) // self.num_heads, x.size(1))\n" + Q),
        only=True,
    ),
    wrong(
        "attention_keeps_a_constant_on_the_cpu",
        "2.3",
        "meta",
        ("        self.num_heads = num_heads\n", "        self.num_heads = num_heads\n        self._one = torch.ones(1)\n"),
        (Q, Q + "        q = q * self._one.to(q.dtype)\n"),
        only=True,
    ),
    wrong("table_dropped_by_train", "2.3", "after train()",
          (NO_INFERENCE, "    def train(self, mode: bool = True):\n        if mode:\n            self._cos = self._sin = self._cos[:0]\n"
                         "        return super().train(mode)\n\n" + NO_INFERENCE), only=True),
    # 2.4
    wrong("key_not_rotated", "2.4", "both turn", (K, K.replace("self.rotary_emb(self._split_heads(self.k_proj(x)))", "self._split_heads(self.k_proj(x))")), only=True),
    wrong("query_not_rotated", "2.4", "both turn", (Q, Q.replace("self.rotary_emb(self._split_heads(self.q_proj(x)))", "self._split_heads(self.q_proj(x))"))),
    wrong("nothing_rotated", "2.4", "softmax(rope(q)", (Q, Q.replace("self.rotary_emb(", "(")), (K, K.replace("self.rotary_emb(", "("))),
    wrong("value_rotated", "2.4", "values not turned", (V, V.replace("self._split_heads(self.v_proj(x))", "self.rotary_emb(self._split_heads(self.v_proj(x)))"))),
    wrong("rotated_before_the_heads_are_split", "2.4", "attention(x)", (Q, "        q = self._split_heads(self.rotary_emb(self.q_proj(x).unflatten(-1, (self.num_heads, -1))).flatten(2))\n"), (K, "        k = self._split_heads(self.rotary_emb(self.k_proj(x).unflatten(-1, (self.num_heads, -1))).flatten(2))\n")),
    wrong("rotated_twice", "2.4", "both turn", (K, K + "        k = self.rotary_emb(k)\n")),
    wrong("no_transpose", "2.4", "split and joined", (SPLIT, "        return x.reshape(x.size(0), self.num_heads, x.size(1), -1)\n")),
    wrong("no_transpose_back", "2.4", "split and joined", (OUT, "        return self.o_proj(context.reshape(x.shape))\n")),
    wrong("no_scale", "2.4", "√Dh", (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, scale=1.0"))),
    wrong("scale_by_d_model", "2.4", "√Dh", (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, scale=x.size(-1) ** -0.5"))),
    wrong("causal_unasked", "2.4", "attention(x)", (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, is_causal=mask is None"))),
    wrong("no_output_projection", "2.4", "attention(x)", (OUT, "        return context.transpose(1, 2).flatten(start_dim=2)\n")),
    wrong("no_output_bias", "2.4", "attention(x)", (OUT, "        return context.transpose(1, 2).flatten(start_dim=2) @ self.o_proj.weight.mT\n")),
    wrong("values_from_the_key_projection", "2.4", "attention(x)", (V, V.replace("v_proj", "k_proj"))),
    wrong("inverted_mask", "2.4", "attention(x, mask)", (TO_BOOL, "            mask = ~mask.bool()\n")),
    wrong("mask_ignored", "2.4", "attention(x, mask)", (TO_BOOL, "            mask = None\n")),
    wrong("mask_added", "2.4", "attention(x, mask)", (TO_BOOL, "            mask = mask.to(x.dtype)\n")),
    wrong("only_bool_masks", "2.4", "mask", (TO_BOOL, "            pass\n")),
    wrong("integer_mask_inverted_bitwise", "2.4", "mask of uint8", (TO_BOOL, "            mask = ~(~mask).bool() if mask.dtype in (torch.uint8, torch.int32, torch.int64) else mask.bool()\n")),
    wrong("mask_of_the_first_head_for_all", "2.4", "mask of shape", (TO_BOOL, "            mask = mask.bool()[:, :1]\n"), only=True),
    wrong("mask_of_the_first_row_for_all", "2.4", "attention(x", (TO_BOOL, "            mask = mask.bool()[:1]\n"), only=True),
    wrong(
        "nan_for_masked_rows",
        "2.4",
        "NaN",
        (
            ATTEND,
            "        scores = q @ k.mT / q.size(-1) ** 0.5\n"
            "        if mask is not None:\n"
            '            scores = scores.masked_fill(~mask, float("-inf"))\n'
            "        context = scores.softmax(dim=-1) @ v\n",
        ),
        only=True,
    ),
    wrong(
        "uniform_masked_rows",
        "2.4",
        "zero weights",
        (
            ATTEND,
            "        scores = q @ k.mT / q.size(-1) ** 0.5\n"
            "        if mask is not None:\n"
            "            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)\n"
            "        context = scores.softmax(dim=-1) @ v\n",
        ),
        only=True,
    ),
    wrong(
        "small_fill",
        "2.4",
        "values differ",
        (
            ATTEND,
            "        scores = q @ k.mT / q.size(-1) ** 0.5\n"
            "        if mask is not None:\n"
            "            scores = scores.masked_fill(~mask, -20.0)\n"
            "        context = scores.softmax(dim=-1) @ v\n"
            "        if mask is not None:\n"
            "            context = context * mask.any(dim=-1, keepdim=True)\n",
        ),
    ),
    wrong("detached_keys", "2.4", "gradient of", (ATTEND, ATTEND.replace("(q, k, v", "(q, k.detach(), v")), only=True),
    wrong(
        "weights_kept_from_the_first_call",
        "2.4",
        "changed in place",
        (V, "        if not hasattr(self, '_wv'):\n            self._wv = self.v_proj.weight.detach().clone()\n"
            "        stale = self._wv.to(x) - self.v_proj.weight.detach()\n"
            "        v = self._split_heads(self.v_proj(x) + x @ stale.mT)\n"),
        only=True,
    ),
    wrong("x_written_to", "2.4", "x is written to", (OUT, "        x.data.mul_(2)\n" + OUT)),
    wrong("mask_written_to", "2.4", "mask is written to", (CHECK, CHECK + "            if mask.dtype == torch.bool and not mask.is_meta:\n                mask.logical_not_()\n                mask = mask.logical_not()\n")),
    wrong("heads_fixed", "2.4", "[3, -1]", ("        self.num_heads = num_heads\n", "        self.num_heads = 3\n")),
    wrong("head_dim_fixed", "2.4", "tensor a (4)", (SPLIT, SPLIT.replace("(self.num_heads, -1)", "(-1, 4)"))),
    wrong("scale_fixed", "2.4", "Dh=10", (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, scale=0.5")), only=True),
    wrong("batch_fixed", "2.4", "B=3", (V, V + "        v = v[torch.arange(v.size(0)) % 2]\n"), only=True),
    wrong("float_mask_written_to", "2.4", "mask is written to",
          (TO_BOOL, "            bias = mask.to(x.dtype)\n            bias -= 1\n            mask = bias == 0\n"), only=True),
    wrong("integer_mask_written_to", "2.4", "mask is written to",
          (TO_BOOL, "            mask = mask.long().neg_() != 0\n"), only=True),
    wrong("a_masked_head_not_zeroed", "2.4", "in one head",
          (ATTEND, "        scores = q @ k.mT / q.size(-1) ** 0.5\n"
                   "        if mask is not None:\n"
                   "            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)\n"
                   "        context = scores.softmax(dim=-1) @ v\n"
                   "        if mask is not None:\n"
                   "            context = context * mask.any(-1, keepdim=True).any(dim=1, keepdim=True)\n"), only=True),
    wrong("weights_times_the_mask", "2.4", "scalar type Double",
          (TO_BOOL, "            pass\n"),
          (ATTEND, "        scores = q @ k.mT / q.size(-1) ** 0.5\n"
                   "        if mask is not None:\n"
                   "            scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)\n"
                   "        weights = scores.softmax(dim=-1)\n"
                   "        context = (weights if mask is None else weights * mask) @ v\n")),
    wrong("float32_masks_in_half_precision_fail", "2.7", "scalar type Float",
          (TO_BOOL, "            mask = mask.float() if mask.dtype == torch.float64 and x.dtype == torch.float32 else mask\n"),
          (ATTEND, "        scores = q @ k.mT / q.size(-1) ** 0.5\n"
                   "        if mask is not None:\n"
                   "            scores = scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)\n"
                   "        weights = scores.softmax(dim=-1)\n"
                   "        context = (weights if mask is None else weights * mask) @ v\n"), only=True),
    wrong("fill_of_1e9", "2.7", "overflow",
          (ATTEND, "        scores = q @ k.mT / q.size(-1) ** 0.5\n"
                   "        if mask is not None:\n"
                   "            scores = scores.masked_fill(~mask, -1e9)\n"
                   "        context = scores.softmax(dim=-1) @ v\n"
                   "        if mask is not None:\n"
                   "            context = context * mask.any(-1, keepdim=True)\n"), only=True),
    wrong("fill_of_1e4", "2.4", "1000 times",
          (ATTEND, "        scores = q @ k.mT / q.size(-1) ** 0.5\n"
                   "        if mask is not None:\n"
                   "            scores = scores.masked_fill(~mask, -1e4)\n"
                   "        context = scores.softmax(dim=-1) @ v\n"
                   "        if mask is not None:\n"
                   "            context = context * mask.any(-1, keepdim=True)\n"), only=True),
    wrong("context_detached_in_eval", "2.4", "in eval", (ATTEND, ATTEND + "        if not self.training:\n            context = context.detach()\n"), only=True),
    wrong("attention_detaches_x_in_eval", "2.4", "in eval", (Q, "        if not self.training:\n            x = x.detach()\n" + Q), only=True),
    wrong("causal_where_long", "2.4", "L=41", (ATTEND, ATTEND.replace("attn_mask=mask", "attn_mask=mask, is_causal=mask is None and x.size(1) > 16")), only=True),
    wrong("windowed", "2.4", "L=41",
          (ATTEND, "        row = torch.arange(x.size(1), device=x.device)\n"
                   "        near = (row - row[:, None]).abs() < 32\n"
                   + ATTEND.replace("attn_mask=mask", "attn_mask=near if mask is None else mask & near")), only=True),
    # 2.5
    wrong("sines_then_cosines", "2.5", "even features", (SINUS, "    return torch.cat((angles.sin(), angles.cos()), dim=-1)\n"), only=True),
    wrong("cosines_before_sines", "2.5", "even features", (SINUS, SINUS.replace("(angles.sin(), angles.cos())", "(angles.cos(), angles.sin())")), only=True),
    wrong("sinusoidal_exponent_halved", "2.5", "even features", (FREQUENCIES, FREQUENCIES.replace("/ dim)", "/ (2 * dim))")), only=True),
    wrong("sinusoidal_frequency_per_feature", "2.5", "even features",
          (FREQUENCIES, "    frequencies = 10000 ** (-torch.arange(dim) / dim)\n"),
          (SINUS, "    even = torch.arange(dim) % 2 == 0\n    return torch.where(even, angles.sin(), angles.cos())\n"), only=True),
    wrong("sinusoidal_from_one", "2.5", "even features", ("torch.outer(torch.arange(seq_len), frequencies)", "torch.outer(torch.arange(1, seq_len + 1), frequencies)"), only=True),
    wrong("mean_change", "2.5", "largest absolute change", (CHANGE, CHANGE.replace("max()", "mean()")), only=True),
    wrong("signed_change", "2.5", "largest absolute change", (CHANGE, CHANGE.replace(".abs()", "")), only=True),
    wrong("equal_positions_only", "2.5", "largest absolute change", (CHANGE, CHANGE.replace(".abs()", ".diagonal().abs()")), only=True),
    wrong("key_shifted_alone", "2.5", "sinusoidal", (CHANGE, "(s[:seq_len, shift:] - s[:seq_len, :seq_len]).abs().max().item()"), only=True),
    wrong("rope_with_the_key_shifted_alone", "2.5", "rope", (CHANGE, CHANGE.replace("s[shift:, shift:]", "s[0 if name == 'rope' else shift :, shift:][:seq_len]")), only=True),
    wrong("comparison_turns_nothing", "2.5", "was anything turned", (TURNED, "    turned_query, turned_key = query.expand(1, 1, rows, dim), key.expand(1, 1, rows, dim)\n"), only=True),
    wrong("comparison_of_defaults_only", "2.5", "sinusoidal", (DRAW, "    seq_len, dim, shift = 64, 32, 16\n" + DRAW), only=True),
    wrong("comparison_of_other_draws", "2.5", "sinusoidal", (DRAW, DRAW.replace("manual_seed(0)", "manual_seed(1)")), only=True),
    wrong("comparison_as_tensors", "2.5", "Python float", (CHANGE, CHANGE.replace(".item()", "")), only=True),
    wrong("comparison_as_a_tuple", "2.5", "a dict", ("    return {name: " + CHANGE, "    return tuple(" + CHANGE), (" for name, s in scores.items()}", " for name, s in scores.items())"), only=True),
    wrong("sinusoidal_scaled", "2.5", "sinusoidal", ('(query + added) @ (key + added).mT', '(query + added) @ (key + added).mT / dim**0.5'), only=True),
    wrong("rope_of_a_constant", "2.5", "round", ("    return {name: " + CHANGE + " for name, s in scores.items()}\n",
          "    measured = {name: " + CHANGE + " for name, s in scores.items()}\n    return {\"rope\": 1e-6, \"sinusoidal\": measured[\"sinusoidal\"]}\n"), only=True),
    wrong("rope_of_a_crooked_constant", "2.5", "for every seq_len", ("    return {name: " + CHANGE + " for name, s in scores.items()}\n",
          "    measured = {name: " + CHANGE + " for name, s in scores.items()}\n    return measured | {\"rope\": 2.0**-20}\n"), only=True),
    wrong("rope_rounded", "2.5", "round", (CHANGE + " for name", "round(" + CHANGE + ", 7) for name"), only=True),
    # 2.6
    wrong("seq_len_ignored", "2.6", "5 and 6", (POSITIONS, "        positions = slice(0, length)\n"), only=True),
    wrong("seq_len_as_offset", "2.6", "5 and 6",
          (SMALL, SMALL + "        if seq_len > length:\n            seq_len = seq_len + length\n"), only=True),
    wrong("seq_len_as_last_index", "2.6", "5 and 6",
          (SMALL, SMALL + "        if seq_len > length:\n            seq_len = seq_len + 1\n"), only=True),
    wrong("all_rows_at_the_last_position", "2.6", "5 and 6",
          (TURN, "        if seq_len > length:\n            return self.apply_rotary_pos_emb(x, self._cos[seq_len - 1], self._sin[seq_len - 1])\n" + TURN), only=True),
    wrong("positions_counted_by_calls", "2.6", "5 and 6",
          (INIT, INIT + "        self._past = 0\n"),
          (SMALL, SMALL + "        if seq_len > length:\n            self._past += length\n            seq_len = min(seq_len, self._past + length)\n"), only=True),
    wrong("clamped_to_the_expected", "2.6", "max_position_embeddings",
          (STALE, "        if x.device != self._cos.device:\n"),
          (POSITIONS, "        positions = torch.arange(seq_len - length, seq_len, device=x.device).clamp(max=rows - 1)\n")),
    wrong("wrapped_at_the_expected", "2.6", "max_position_embeddings",
          (STALE, "        if x.device != self._cos.device:\n"),
          (POSITIONS, "        positions = torch.arange(seq_len - length, seq_len, device=x.device) % rows\n")),
    wrong("refused_beyond_the_expected", "2.6", "max_position_embeddings",
          (INIT, INIT + "        self._limit = max_position_embeddings\n"),
          (STALE, '        if seq_len > self._limit:\n            raise ValueError(f"seq_len {seq_len} exceeds max_position_embeddings")\n' + STALE)),
    wrong("interpolated_beyond_the_expected", "2.6", "max_position_embeddings",
          (INIT, INIT + "        self._limit = max_position_embeddings\n"),
          (ARANGE, ARANGE + "        positions = positions * min(1.0, getattr(self, '_limit', rows) / max(rows, 1))\n")),
    wrong("positions_modulo_4096", "2.6", "5000", (ARANGE, ARANGE + "        positions = positions % 4096\n"), only=True),
    wrong("positions_clamped_at_4001", "2.6", "5000", (ARANGE, ARANGE + "        positions = positions.clamp(max=4001)\n"), only=True),
    # 2.7
    wrong("table_in_the_inputs_dtype", "2.7", "stay float32",
          (TURN, "        return self.apply_rotary_pos_emb(x, self._cos[positions].to(x.dtype), self._sin[positions].to(x.dtype))\n"), only=True),
    wrong("cos_cast_in_apply", "2.7", "stay float32", (APPLY, "        return x * cos.to(x.dtype) + self.rotate_half(x) * sin.to(x.dtype)\n"), only=True),
    wrong("angles_in_the_inputs_dtype", "2.7", "float16",
          *keeping("True", "self._table(max(rows, seq_len), x.device, x.dtype)"),
          ("def _table(self, rows: int, device: torch.device)", "def _table(self, rows, device, dtype=torch.float32)"),
          (ANGLES, "        angles = torch.outer(positions.to(dtype), (self.base**-exponents).to(dtype)).repeat(1, 2)\n")),
    wrong("tables_in_buffers", "2.7", "after .to(bfloat16)",
          (INIT, '        cos, sin = self._table(max_position_embeddings, torch.get_default_device())\n'
                 '        self.register_buffer("_cos", cos, persistent=False)\n        self.register_buffer("_sin", sin, persistent=False)\n'), only=True),
    wrong("inv_freq_in_a_buffer", "2.7", "after .to(bfloat16)",
          (INIT, '        self.register_buffer("inv_freq", base ** (-torch.arange(0, dim, 2) / dim))\n'
                 "        self._cos = self._sin = torch.empty(0, dim)\n"),
          (ANGLES, "        angles = torch.outer(positions, self.inv_freq.to(positions)).repeat(1, 2)\n"), only=True),
    wrong("tables_follow_the_modules_dtype", "2.7", "after .to(bfloat16)",
          (INIT, INIT + '        self.register_buffer("_kind", torch.zeros(()), persistent=False)\n'),
          (TURN, "        kind = torch.float32 if x.is_meta else self._kind.dtype\n"
                 "        return self.apply_rotary_pos_emb(x, self._cos[positions].to(kind), self._sin[positions].to(kind))\n"), only=True),
    wrong("float32_results", "2.7", "cast the result", (APPLY, "        return x * cos + self.rotate_half(x) * sin\n"), only=True),
    wrong("float64_results", "2.7", "cast the result", (TABLE, "        return angles.cos(), angles.sin()\n"), (APPLY, "        return x * cos + self.rotate_half(x) * sin\n")),
    wrong("forward_casts_but_apply_does_not", "2.7", "apply_rotary_pos_emb",
          (APPLY, "        return x * cos + self.rotate_half(x) * sin\n"), (TURN, TURN.rstrip("\n") + ".to(x.dtype)\n"), only=True),
    wrong("positions_in_float16", "2.7", "position 3", (ARANGE, ARANGE + "        positions = positions.half().double()\n"), only=True),
    wrong("frequencies_off_by_a_near_miss", "2.7", "position 3", (ANGLES, ANGLES.replace("self.base**-exponents", "self.base**-exponents * (1 + 2.5e-7)"))),
    wrong("inference_tensors_kept", "2.7", "inference", (NO_INFERENCE, ""), only=True),
    wrong("x_detached", "2.7", "no gradient", (TURN, TURN.replace("(x, self", "(x.detach(), self"))),
    wrong("graph_kept_in_the_table", "2.7", "second",
          (INIT, "        self.frequency = nn.Parameter(torch.ones(()))\n        self._cos = self._sin = torch.empty(0, dim)\n"),
          (ANGLES, ANGLES.replace("torch.outer(positions, ", "torch.outer(positions * self.frequency, "))),
    wrong("no_gradient_in_eval", "2.7", "eval", (TURN, "        if not self.training:\n            x = x.detach()\n" + TURN)),
    wrong("no_gradient_in_half_precision", "2.7", "float16", (TURN, "        if x.dtype.itemsize == 2:\n            x = x.detach()\n" + TURN), only=True),
    wrong("rounded_twice", "2.7", "once", (APPLY, "        return (x * cos).to(x.dtype) + (self.rotate_half(x) * sin).to(x.dtype)\n"), only=True),
    # 2.8
    wrong("odd_dim_accepted", "2.8", "RotaryPositionEmbedding(7)", (ODD, ""), only=True),
    wrong("odd_dim_without_the_number", "2.8", "lacks 7", (ODD, ODD.replace("{dim} is odd", "is odd")), only=True),
    wrong("odd_dim_asserted", "2.8", "ValueError was wanted", (ODD, ODD.replace("raise ValueError(", "raise AssertionError(")), only=True),
    wrong("odd_sinusoidal_dim_accepted", "2.8", "sinusoidal_position_embedding", (ODD_SINUS, ""), only=True),
    wrong("small_seq_len_accepted", "2.8", "seq_len=13", (SMALL, "        seq_len = max(seq_len, length)\n"), only=True),
    wrong("small_seq_len_without_numbers", "2.8", "lacks 13", (SMALL, SMALL.replace("{seq_len} is less than the {length} rows", "is less than the rows")), only=True),
    wrong("seq_len_0_read_as_none", "2.8", "seq_len=0", (NONE, "        if not seq_len:\n"), only=True),
    wrong("seq_len_0_alone_accepted", "2.8", "seq_len=0", (SMALL, SMALL.replace("if seq_len < length", "if 0 < seq_len < length").replace("        if 0", "        seq_len = seq_len or length\n        if 0")), only=True),
    wrong("bad_d_model_accepted", "2.8", "MultiHeadAttentionWithRoPE(10, 4)", (BAD_D_MODEL, "        if d_model < num_heads:\n"), only=True),
    wrong("bad_masks_accepted", "2.8", "mask of shape", (CHECK, ""), only=True),
    wrong("only_dimensions_checked", "2.8", "mask of shape", (FITS, "        fits = mask.dim() == 4\n"), only=True),
    wrong("broadcastable_is_enough", "2.8", "ValueError was wanted",
          (FITS, "        try:\n            torch.broadcast_shapes(mask.shape, scores_shape)\n            fits = mask.dim() == 4\n"
                 "        except RuntimeError:\n            fits = False\n"), only=True),
    wrong("mask_error_without_shapes", "2.8", "lacks", ("raise ValueError(f\"mask of shape {tuple(mask.shape)} does not broadcast to the scores' {scores_shape}\")", 'raise ValueError("bad mask")'), only=True),
    wrong("negative_seq_len_accepted", "2.8", "seq_len=-3", (SMALL, SMALL.replace("if seq_len < length", "if 0 <= seq_len < length")), only=True),
    wrong("masks_may_enlarge_the_keys", "2.8", "(1, 1, 1, 3)", (FITS, FITS.replace("size in (1, full)", "size == 1 or full in (1, size)").replace("zip(mask.shape, scores_shape, strict=True)", "list(zip(mask.shape, scores_shape, strict=True))[3:]").replace("mask.dim() == 4 and", "mask.dim() == 4 and all(size in (1, full) for size, full in list(zip(mask.shape, scores_shape, strict=True))[:3]) and")), only=True),
    wrong("masks_may_enlarge_the_heads", "2.8", "(1, 3, 1, 5)", (FITS, FITS.replace("size in (1, full)", "size == 1 or size == full or (i == 1 and full == 1)").replace("for size, full in zip(mask.shape, scores_shape, strict=True)", "for i, (size, full) in enumerate(zip(mask.shape, scores_shape, strict=True))")), only=True),
    wrong("odd_head_accepted", "2.8", "MultiHeadAttentionWithRoPE(15, 3)", ("        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads, max_position_embeddings)\n", "        self.rotary_emb = RotaryPositionEmbedding(d_model // num_heads // 2 * 2, max_position_embeddings)\n"), only=True),
    # 2.9
    wrong("own_test_that_always_fails", "2.9", "not yet", (OWN, OWN + '    raise AssertionError("not yet")\n'), only=True),
    wrong("own_test_of_nothing", "2.9", "passes although", (OWN, OWN + "    if rope is not None:\n        return\n"), only=True),
    wrong("own_test_without_seq_len", "2.9", "seq_len_ignored", (OWN_SEQ_LEN, ""), only=True),
    wrong("own_test_of_private_names", "2.9", "fails on right code", (OWN_SPLIT, "        attention._split_heads(project(x))\n"), only=True),
    # 2.10
    wrong("unused_import", "2.10", "F401", ("import torch\nfrom torch import Tensor, nn\n", "import math\n\nimport torch\nfrom torch import Tensor, nn\n"), only=True),
    wrong("untyped_helper", "2.10", "annotation", ("    def _split_heads(self, x: Tensor) -> Tensor:\n", "    def _split_heads(self, x):\n"), only=True),
    wrong("silenced", "2.10", "F401", ("from torch.nn import functional\n", "from torch.nn import functional, init  # noqa: F401\n"), only=True),
]  # fmt: skip
