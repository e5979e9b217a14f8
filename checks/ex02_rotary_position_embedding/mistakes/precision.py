"""Wrong answers that lose precision, x's dtype or the gradient (2.7)."""

from harness.model.bank import Mistake

INIT = "        self._cos, self._sin = self._table(max_position_embeddings, torch.get_default_device())\n"
STALE = "        if seq_len > rows or x.device != self._cos.device:\n"
GROW = "            self._cos, self._sin = self._table(rows if seq_len <= rows else max(seq_len, 2 * rows), x.device)\n"
TURN = "        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])\n"
APPLY = "        return (x * cos + self.rotate_half(x) * sin).to(x.dtype)\n"
NO_INFERENCE = "    @torch.inference_mode(False)  # A table made in inference mode could never serve training.\n"
ARANGE = "        positions = torch.arange(rows, dtype=torch.float64, device=device)\n"
ANGLES = "        angles = torch.outer(positions, self.base**-exponents).repeat(1, 2)  # [rows, Dh]\n"
TABLE = "        return angles.cos().float(), angles.sin().float()\n"
UNCAST = "        return x * cos + self.rotate_half(x) * sin\n"

MISTAKES = [
    Mistake(
        "table_in_the_inputs_dtype",
        "2.7",
        "stay float32",
        (TURN, TURN.replace("[positions]", "[positions].to(x.dtype)")),
        only=True,
    ),
    Mistake(
        "cos_cast_in_apply",
        "2.7",
        "stay float32",
        (APPLY, "        return x * cos.to(x.dtype) + self.rotate_half(x) * sin.to(x.dtype)\n"),
        only=True,
    ),
    Mistake(
        "angles_in_the_inputs_dtype",
        "2.7",
        "float16",
        (STALE, "        if True:\n"),
        (GROW, "            self._cos, self._sin = self._table(max(rows, seq_len), x.device, x.dtype)\n"),
        (
            INIT,
            INIT
            + """\
        self._seen: tuple = ()
        self._cache: dict = {}
""",
        ),
        ("def _table(self, rows: int, device: torch.device)", "def _table(self, rows, device, dtype=torch.float32)"),
        (ANGLES, "        angles = torch.outer(positions.to(dtype), (self.base**-exponents).to(dtype)).repeat(1, 2)\n"),
    ),
    Mistake(
        "tables_in_buffers",
        "2.7",
        "after .to(bfloat16)",
        (
            INIT,
            """\
        cos, sin = self._table(max_position_embeddings, torch.get_default_device())
        self.register_buffer("_cos", cos, persistent=False)
        self.register_buffer("_sin", sin, persistent=False)
""",
        ),
    ),
    Mistake(
        "inv_freq_in_a_buffer",
        "2.7",
        "after .to(bfloat16)",
        (
            INIT,
            """\
        self.register_buffer("inv_freq", base ** (-torch.arange(0, dim, 2) / dim))
        self._cos = self._sin = torch.empty(0, dim)
""",
        ),
        (ANGLES, "        angles = torch.outer(positions, self.inv_freq.to(positions)).repeat(1, 2)\n"),
    ),
    Mistake(
        "tables_follow_the_modules_dtype",
        "2.7",
        "after .to(bfloat16)",
        (INIT, INIT + '        self.register_buffer("_kind", torch.zeros(()), persistent=False)\n'),
        (
            TURN,
            "        kind = torch.float32 if x.is_meta else self._kind.dtype\n"
            + TURN.replace("[positions]", "[positions].to(kind)"),
        ),
        only=True,
    ),
    Mistake(
        "float32_results",
        "2.7",
        "cast the result",
        (APPLY, UNCAST),
        only=True,
    ),
    Mistake(
        "float64_results",
        "2.7",
        "cast the result",
        (TABLE, "        return angles.cos(), angles.sin()\n"),
        (APPLY, UNCAST),
    ),
    Mistake(
        "forward_casts_but_apply_does_not",
        "2.7",
        "apply_rotary_pos_emb",
        (APPLY, UNCAST),
        (TURN, TURN.replace(")\n", ").to(x.dtype)\n")),
        only=True,
    ),
    Mistake(
        "positions_in_float16",
        "2.7",
        "position 3",
        (ARANGE, ARANGE + "        positions = positions.half().double()\n"),
    ),
    Mistake(
        "frequencies_off_by_a_near_miss",
        "2.7",
        "position 3",
        (ANGLES, ANGLES.replace("self.base**-exponents", "self.base**-exponents * (1 + 2.5e-7)")),
    ),
    Mistake("inference_tensors_kept", "2.7", "inference", (NO_INFERENCE, ""), only=True),
    Mistake(
        "inference_tensors_kept_when_the_table_grows_again",
        "2.7",
        "inference",
        (NO_INFERENCE, ""),
        (
            GROW,
            "            with torch.inference_mode(torch.is_inference_mode_enabled() and rows > 8):\n    " + GROW,
        ),
    ),
    Mistake("x_detached", "2.7", "no gradient", (TURN, TURN.replace("(x, self", "(x.detach(), self"))),
    Mistake(
        "graph_kept_in_the_table",
        "2.7",
        "carries a gradient",
        (
            INIT,
            """\
        self.frequency = nn.Parameter(torch.ones(()))
        self._cos = self._sin = torch.empty(0, dim)
""",
        ),
        (ANGLES, ANGLES.replace("torch.outer(positions, ", "torch.outer(positions * self.frequency, ")),
    ),
    Mistake(
        "no_gradient_in_eval",
        "2.7",
        "eval",
        (
            TURN,
            """\
        if not self.training:
            x = x.detach()
"""
            + TURN,
        ),
    ),
    Mistake(
        "no_gradient_in_half_precision",
        "2.7",
        "float16",
        (
            TURN,
            """\
        if x.dtype.itemsize == 2:
            x = x.detach()
"""
            + TURN,
        ),
        only=True,
    ),
    Mistake(
        "rounded_twice",
        "2.7",
        "once",
        (APPLY, "        return (x * cos).to(x.dtype) + (self.rotate_half(x) * sin).to(x.dtype)\n"),
        only=True,
    ),
    Mistake(
        "near_miss_of_1e_4",
        "2.7",
        "off by",
        (TABLE, "        return (angles + 1e-4 * positions[:, None]).cos().float(), angles.sin().float()\n"),
    ),
    Mistake(
        "table_in_float16",
        ("2.7", "2.5"),
        "off by",
        (TABLE, "        return angles.cos().half().float(), angles.sin().half().float()\n"),
    ),
    Mistake(
        "angles_by_a_product_under_autocast",
        "2.7",
        "autocast",
        (
            ANGLES,
            "        angles = (positions.float()[:, None] @ (self.base**-exponents).float()[None]).repeat(1, 2)\n",
        ),
        only=True,
    ),
]
