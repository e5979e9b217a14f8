"""Wrong answers that misread seq_len, or treat late positions otherwise (2.6)."""

from harness.model.bank import Mistake

INIT = "        self._cos, self._sin = self._table(max_position_embeddings, torch.get_default_device())\n"
SMALL = """\
        if seq_len < length:
            raise ValueError(f"seq_len {seq_len} is less than the {length} rows of x")
"""
STALE = "        if seq_len > rows or x.device != self._cos.device:\n"
POSITIONS = "        positions = slice(seq_len - length, seq_len)\n"
TURN = "        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])\n"
ARANGE = "        positions = torch.arange(rows, dtype=torch.float64, device=device)\n"
WITH_LIMIT = INIT + "        self._limit = max_position_embeddings\n"

MISTAKES = [
    Mistake("seq_len_ignored", "2.6", "5 and 6", (POSITIONS, "        positions = slice(0, length)\n"), only=True),
    Mistake(
        "seq_len_as_offset",
        "2.6",
        "5 and 6",
        (
            SMALL,
            SMALL
            + """\
        if seq_len > length:
            seq_len = seq_len + length
""",
        ),
        only=True,
    ),
    Mistake(
        "seq_len_as_last_index",
        "2.6",
        "5 and 6",
        (
            SMALL,
            SMALL
            + """\
        if seq_len > length:
            seq_len = seq_len + 1
""",
        ),
        only=True,
    ),
    Mistake(
        "all_rows_at_the_last_position",
        "2.6",
        "5 and 6",
        (
            TURN,
            """\
        if seq_len > length:
            return self.apply_rotary_pos_emb(x, self._cos[seq_len - 1], self._sin[seq_len - 1])
"""
            + TURN,
        ),
        only=True,
    ),
    Mistake(
        "positions_counted_by_calls",
        "2.6",
        "5 and 6",
        (INIT, INIT + "        self._past = 0\n"),
        (
            SMALL,
            SMALL
            + """\
        if seq_len > length:
            self._past += length
            seq_len = min(seq_len, self._past + length)
""",
        ),
        only=True,
    ),
    Mistake(
        "clamped_to_the_expected",
        "2.6",
        "max_position_embeddings",
        (STALE, "        if x.device != self._cos.device:\n"),
        (
            POSITIONS,
            "        positions = torch.arange(seq_len - length, seq_len, device=x.device).clamp(max=rows - 1)\n",
        ),
    ),
    Mistake(
        "wrapped_at_the_expected",
        "2.6",
        "max_position_embeddings",
        (STALE, "        if x.device != self._cos.device:\n"),
        (POSITIONS, "        positions = torch.arange(seq_len - length, seq_len, device=x.device) % rows\n"),
    ),
    Mistake(
        "refused_beyond_the_expected",
        "2.6",
        "max_position_embeddings",
        (INIT, WITH_LIMIT),
        (
            STALE,
            """\
        if seq_len > self._limit:
            raise ValueError(f"seq_len {seq_len} exceeds max_position_embeddings")
"""
            + STALE,
        ),
    ),
    Mistake(
        "interpolated_beyond_the_expected",
        "2.6",
        "depends on its position alone",
        (INIT, WITH_LIMIT),
        (ARANGE, ARANGE + "        positions = positions * min(1.0, getattr(self, '_limit', rows) / max(rows, 1))\n"),
    ),
    Mistake(
        "positions_modulo_4096", "2.6", "5000", (ARANGE, ARANGE + "        positions = positions % 4096\n"), only=True
    ),
    Mistake(
        "positions_clamped_at_4001",
        "2.6",
        "5000",
        (ARANGE, ARANGE + "        positions = positions.clamp(max=4001)\n"),
        only=True,
    ),
]
