"""Wrong answers that make cosines again, or keep what they must not keep (2.3)."""

from harness.model.bank import Mistake

INIT = "        self._cos, self._sin = self._table(max_position_embeddings, torch.get_default_device())\n"
STALE = "        if seq_len > rows or x.device != self._cos.device:\n"
GROW = "            self._cos, self._sin = self._table(rows if seq_len <= rows else max(seq_len, 2 * rows), x.device)\n"
TURN = "        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])\n"
NO_INFERENCE = "    @torch.inference_mode(False)  # A table made in inference mode could never serve training.\n"
TABLE = "        return angles.cos().float(), angles.sin().float()\n"
Q = "        q = self.rotary_emb(self._split_heads(self.q_proj(x)))  # [B, H, L, Dh]\n"
WITH_CACHE = (
    INIT
    + """\
        self._seen: tuple = ()
        self._cache: dict = {}
"""
)
ALWAYS = "        if True:\n"
NO_TABLE = "        self._cos = self._sin = torch.empty(0, dim)\n"
CLASS = "class RotaryPositionEmbedding(nn.Module):\n"
SHARED_CACHE = """\
SHARED: dict = {}


def _shared(rope, rows, device):
    key = (rows, rope.dim, rope.base)
    if key not in SHARED:
        SHARED[key] = rope._table(rows, device)
    return SHARED[key]


class RotaryPositionEmbedding(nn.Module):
"""
GROW_SHARED = "            self._cos, self._sin = _shared(self, max(seq_len, rows), x.device)\n"
HEADS = "        self.num_heads = num_heads\n"

MISTAKES = [
    Mistake("table_rebuilt_on_every_call", "2.3", "computes cos", (STALE, ALWAYS), wasteful=True),
    Mistake(
        "rebuilt_by_complex_exponentials",
        "2.3",
        "computes exp",
        (STALE, ALWAYS),
        (
            TABLE,
            """\
        z = torch.exp(1j * angles)
        return z.real.float(), z.imag.float()
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "rebuilt_by_polar",
        "2.3",
        "computes polar",
        (STALE, ALWAYS),
        (
            TABLE,
            """\
        z = torch.polar(torch.ones_like(angles), angles)
        return z.real.float(), z.imag.float()
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "rebuilt_by_powers",
        "2.3",
        "pow (",
        (STALE, ALWAYS),
        (
            TABLE,
            """\
        z = torch.polar(torch.ones_like(angles[:2]), angles[:2])[-1:] ** positions[:, None]
        return z.real.float(), z.imag.float()
""",
        ),
        (INIT, INIT.replace("self._table(max_position_embeddings", "self._table(2 + max_position_embeddings")),
        wasteful=True,
    ),
    Mistake(
        "rebuilt_by_python",
        "2.3",
        "math.cos",
        (STALE, ALWAYS),
        (
            TABLE,
            """\
        import math

        pairs = [self.base ** (-2 * i / self.dim) for i in range(self.dim // 2)] * 2
        cos = [[math.cos(p * f) for f in pairs] for p in range(rows)]
        sin = [[math.sin(p * f) for f in pairs] for p in range(rows)]
        return torch.tensor(cos, device=device), torch.tensor(sin, device=device)
""",
        ),
        (INIT, INIT.replace("self._table(max_position_embeddings", "self._table(0")),
        (GROW, "            self._cos, self._sin = self._table(seq_len, x.device)\n"),
        wasteful=True,
    ),
    Mistake(
        "in_place_cosines_on_every_call",
        "2.3",
        "computes cos",
        (STALE, ALWAYS),
        (TABLE, "        return angles.clone().cos_().float(), angles.sin_().float()\n"),
        wasteful=True,
    ),
    Mistake(
        "rebuilt_for_another_length",
        "2.3",
        "computes cos",
        (STALE, "        if seq_len != len(self._cos) or x.device != self._cos.device:\n"),
        (GROW, "            self._cos, self._sin = self._table(seq_len, x.device)\n"),
        (INIT, WITH_CACHE),
        wasteful=True,
    ),
    Mistake(
        "a_table_per_length",
        "2.3",
        "computes cos",
        (STALE, ALWAYS),
        (
            GROW,
            """\
            self._cos, self._sin = self._cache.get((seq_len, x.device)) or self._table(seq_len, x.device)
            self._cache[seq_len, x.device] = self._cos, self._sin
""",
        ),
        (INIT, WITH_CACHE),
        wasteful=True,
    ),
    Mistake(
        "a_table_per_dtype",
        "2.3",
        "computes cos",
        (STALE, "        if seq_len > rows or self._seen != (x.device, x.dtype):\n"),
        (
            GROW,
            """\
            self._cos, self._sin = self._table(max(rows, seq_len), x.device)
            self._seen = (x.device, x.dtype)
""",
        ),
        (INIT, WITH_CACHE),
        wasteful=True,
    ),
    Mistake(
        "a_table_per_shape",
        "2.3",
        "another batch size",
        (STALE, "        if seq_len > rows or self._seen != (x.device, x.size(0), x.size(1)):\n"),
        (
            GROW,
            """\
            self._cos, self._sin = self._table(max(rows, seq_len), x.device)
            self._seen = (x.device, x.size(0), x.size(1))
""",
        ),
        (INIT, WITH_CACHE),
        wasteful=True,
    ),
    Mistake(
        "nothing_kept_at_inference",
        "2.3",
        "inference_mode",
        (STALE, "        if seq_len > rows or x.device != self._cos.device or torch.is_inference_mode_enabled():\n"),
        wasteful=True,
    ),
    Mistake(
        "not_kept_beyond_the_expected",
        "2.3",
        "computes cos",
        (STALE, "        if x.device != self._cos.device:\n"),
        (GROW, "            self._cos, self._sin = self._table(rows, x.device)\n"),
        (
            TURN,
            """\
        cos, sin = (self._cos, self._sin) if seq_len <= rows else self._table(seq_len, x.device)
        return self.apply_rotary_pos_emb(x, cos[positions], sin[positions])
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "a_long_table_trimmed_by_a_short_call",
        "2.3",
        "computes cos",
        (
            STALE,
            "        if rows > 4096 and seq_len <= 64:\n            self._cos, self._sin = (t[:2048].clone() "
            "for t in (self._cos, self._sin))\n        rows = len(self._cos)\n" + STALE,
        ),
        wasteful=True,
    ),
    Mistake(
        "only_the_rows_of_the_call_kept",
        "2.3",
        "computes cos",
        (STALE, "        if self._seen != (seq_len - length, seq_len, x.device):\n"),
        (
            GROW,
            """\
            self._cos, self._sin = self._table(seq_len, x.device)
            self._seen = (seq_len - length, seq_len, x.device)
""",
        ),
        (INIT, WITH_CACHE),
        wasteful=True,
    ),
    Mistake(
        "cache_keyed_on_length_only",
        "2.3",
        "computes cos",
        (STALE, ALWAYS),
        (
            GROW,
            "            self._cos, self._sin = self._cache.get(seq_len) or "
            "tuple(t.to(x.dtype) for t in self._table(seq_len, x.device))\n"
            "            self._cache[seq_len] = self._cos, self._sin\n",
        ),
        (INIT, WITH_CACHE),
    ),
    Mistake(
        "table_in_the_first_dtype",
        "2.7",
        "off by",
        (TURN, "        self._cos, self._sin = self._cos.to(x.dtype), self._sin.to(x.dtype)\n" + TURN),
    ),
    Mistake("table_left_on_the_first_device", "2.3", "meta", (STALE, "        if seq_len > rows:\n"), only=True),
    Mistake(
        "table_moved_only_when_it_grows",
        "2.3",
        "meta",
        (STALE, "        if seq_len > rows or not rows:\n"),
        (INIT, NO_TABLE),
        only=True,
    ),
    Mistake(
        "cache_shared_between_devices",
        "2.3",
        "meta",
        (GROW, GROW_SHARED),
        (STALE, "        if seq_len > rows:\n"),
        (INIT, NO_TABLE),
        (CLASS, SHARED_CACHE),
        only=True,
    ),
    Mistake(
        "one_length_for_the_tables_of_all_devices",
        "2.3",
        "must match",
        (INIT, INIT + "        self._tables: dict = {}\n        self._longest = 0\n"),
        (STALE, "        if x.device not in self._tables or seq_len > self._longest:\n"),
        (
            GROW,
            """\
            self._longest = max(seq_len, self._longest)
            self._tables[x.device] = self._table(self._longest, x.device)
        self._cos, self._sin = self._tables[x.device]
""",
        ),
    ),
    Mistake(
        "cache_shared_between_bases",
        "2.3",
        "shared",
        (GROW, GROW_SHARED),
        (INIT, NO_TABLE),
        (CLASS, SHARED_CACHE.replace("rope.base", "device")),
    ),
    Mistake(
        "new_rows_start_at_position_0",
        "2.3",
        "has served",
        (
            GROW,
            """\
            cos, sin = self._table(seq_len - rows if x.device == self._cos.device else seq_len, x.device)
            if x.device == self._cos.device:
                cos, sin = torch.cat((self._cos, cos)), torch.cat((self._sin, sin))
            self._cos, self._sin = cos, sin
""",
        ),
    ),
    Mistake(
        "persistent_tables",
        "2.3",
        "state_dict",
        (INIT, INIT + '        self.register_buffer("table", torch.stack((self._cos, self._sin)))\n'),
        only=True,
    ),
    Mistake(
        "longest_length_in_the_state",
        "2.3",
        "state_dict",
        (INIT, INIT + '        self.register_buffer("longest", torch.tensor(0))\n'),
        (TURN, "        self.longest = torch.maximum(self.longest, torch.tensor(seq_len, device=x.device))\n" + TURN),
    ),
    Mistake(
        "attention_makes_its_rotation_anew",
        "2.3",
        "attention(7 rows)",
        (Q, "        self.rotary_emb = RotaryPositionEmbedding(x.size(-1) // self.num_heads, x.size(1))\n" + Q),
        wasteful=True,
    ),
    Mistake(
        "attention_keeps_a_constant_on_the_cpu",
        "2.3",
        "meta",
        (HEADS, HEADS + "        self._one = torch.ones(1)\n"),
        (Q, Q + "        q = q * self._one.to(q.dtype)\n"),
        only=True,
    ),
    Mistake(
        "table_dropped_by_train",
        "2.3",
        "after train()",
        (
            NO_INFERENCE,
            """\
    def train(self, mode: bool = True):
        if mode:
            self._cos = self._sin = self._cos[:0]
        return super().train(mode)

"""
            + NO_INFERENCE,
        ),
        wasteful=True,
    ),
    Mistake(
        "a_cast_table_as_short_as_the_next_call",
        "2.3",
        "after 23 rows, .to(",
        (
            NO_INFERENCE,
            """\
    def _apply(self, *args, **kwargs):
        self._cos = self._sin = self._cos[:0]
        return super()._apply(*args, **kwargs)

"""
            + NO_INFERENCE,
        ),
        wasteful=True,
    ),
    Mistake(
        "nothing_kept_on_another_device",
        "2.3",
        "after 9 there",
        (STALE, "        if seq_len > rows:\n"),
        (GROW, GROW.replace("x.device", "self._cos.device")),
        (
            TURN,
            """\
        if x.device != self._cos.device:
            cos, sin = self._table(seq_len, x.device)
            return self.apply_rotary_pos_emb(x, cos[positions], sin[positions])
"""
            + TURN,
        ),
        wasteful=True,
    ),
]
