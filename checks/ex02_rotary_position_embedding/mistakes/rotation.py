"""Wrong answers that turn by wrong angles (2.1), or at wrong frequencies (2.2)."""

from harness.model.bank import Mistake

LENGTH = "        length = x.size(-2)\n"
TURN = "        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])\n"
HALF = """\
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((-x2, x1), dim=-1)
"""
APPLY = "        return (x * cos + self.rotate_half(x) * sin).to(x.dtype)\n"
ARANGE = "        positions = torch.arange(rows, dtype=torch.float64, device=device)\n"
EXPONENTS = "        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device) / self.dim\n"
ANGLES = "        angles = torch.outer(positions, self.base**-exponents).repeat(1, 2)  # [rows, Dh]\n"
TABLE = "        return angles.cos().float(), angles.sin().float()\n"
BASE = "        self.base = base\n"

MISTAKES = [
    # 2.1
    Mistake(
        "sin_and_cos_swapped",
        "2.1",
        "cos 0 = 1",
        (TURN, "        return self.apply_rotary_pos_emb(x, self._sin[positions], self._cos[positions])\n"),
    ),
    Mistake("other_direction", "2.1", "other direction", (TURN, TURN.replace("self._sin", "-self._sin"))),
    Mistake(
        "apply_turns_back",
        "2.1",
        "counter-clockwise",
        (APPLY, APPLY.replace("+ self.rotate_half", "- self.rotate_half")),
    ),
    Mistake(
        "rotate_half_of_the_other_sign",
        "2.1",
        "(-x2, x1)",
        (HALF, HALF.replace("(-x2, x1)", "(x2, -x1)")),
        (APPLY, APPLY.replace("+ self.rotate_half", "- self.rotate_half")),
        only=True,
    ),
    Mistake(
        "interleaved_pairs",
        "2.1",
        "halves of the last dimension",
        (HALF, "        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(start_dim=-2)\n"),
    ),
    Mistake(
        "interleaved_in_forward",
        "2.1",
        "paired with i + dim/2",
        (
            TURN,
            """\
        order = torch.arange(self.dim, device=x.device).unflatten(0, (-1, 2)).mT.flatten()
        x = self.apply_rotary_pos_emb(x[..., order], self._cos[positions], self._sin[positions])
        return x[..., order.argsort()]
""",
        ),
    ),
    Mistake("rotate_half_without_a_sign", "2.1", "(-x2, x1)", (HALF, HALF.replace("(-x2, x1)", "(x2, x1)"))),
    Mistake(
        "positions_from_one",
        "2.1",
        "positions count from 0",
        (ARANGE, ARANGE.replace("arange(rows", "arange(1, rows + 1")),
    ),
    Mistake(
        "positions_over_heads",
        "2.1",
        "not along the heads",
        (LENGTH, "        x = x.transpose(1, 2)\n" + LENGTH),
        (TURN, TURN.replace(")\n", ").transpose(1, 2)\n")),
    ),
    Mistake(
        "positions_over_the_batch",
        "2.1",
        "forward(x)[1, 0]",
        (
            TURN,
            """\
        x = x + torch.zeros_like(x)
        for row, first in enumerate(range(seq_len - length, seq_len - length + len(x))):
            cos, sin = self._table(first + length, x.device)
            x[row] = self.apply_rotary_pos_emb(x[row : row + 1], cos[first:], sin[first:])[0]
        return x
""",
        ),
    ),
    Mistake(
        "views_only",
        "2.1",
        "view",
        (
            HALF,
            """\
        x1, x2 = x.view(*x.shape[:-1], 2, -1).unbind(-2)
        return torch.cat((-x2, x1), dim=-1)
""",
        ),
        (LENGTH, "        x.view(-1)\n" + LENGTH),
    ),
    Mistake(
        "x_turned_in_place",
        "2.1",
        "x is written to",
        (
            APPLY,
            """\
        turned = (x * cos + self.rotate_half(x) * sin).to(x.dtype)
        x.data.copy_(turned)
        return turned
""",
        ),
    ),
    Mistake(
        "sin_negated_in_place",
        "2.1",
        "sin is written to",
        (
            APPLY,
            """\
        half = x.size(-1) // 2
        swapped = x.roll(half, dims=-1)
        sin[:, :half].neg_()
        return (x * cos + swapped * sin).to(x.dtype)
""",
        ),
        (TURN, TURN.replace("self._sin[positions]", "self._sin[positions].clone()")),
        only=True,
    ),
    Mistake(
        "norm_not_kept",
        "2.1",
        "values differ",
        (APPLY, "        return ((x * cos + self.rotate_half(x) * sin) / (1 + x.size(-1) // 10)).to(x.dtype)\n"),
    ),
    Mistake(
        "x_written_to_without_gradients",
        "2.1",
        "x is written to",
        (
            TURN,
            """\
        if not torch.is_grad_enabled() and x.dtype == torch.float32 and not x.is_inference():
            return x.copy_(self.apply_rotary_pos_emb(x.clone(), self._cos[positions], self._sin[positions]))
"""
            + TURN,
        ),
    ),
    Mistake(
        "result_laid_out_as_x",
        "2.1",
        "overlapping",
        (
            APPLY,
            """\
        turned = (x * cos + self.rotate_half(x) * sin).to(x.dtype)
        if x.requires_grad or 0 in x.stride():
            return turned
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device).copy_(turned)
""",
        ),
        only=True,
    ),
    # 2.2
    Mistake("one_frequency", "2.2", "base**(-2i/dim)", (EXPONENTS, EXPONENTS.replace(") / self.dim", ") * 0"))),
    Mistake(
        "exponent_halved",
        "2.2",
        "base**(-2i/dim)",
        (EXPONENTS, EXPONENTS.replace(") / self.dim", ") / (2 * self.dim)")),
    ),
    Mistake(
        "exponent_doubled",
        "2.2",
        "base**(-2i/dim)",
        (EXPONENTS, EXPONENTS.replace(") / self.dim", ") / (self.dim // 2)")),
    ),
    Mistake(
        "exponent_of_the_other_sign",
        "2.2",
        "base**(-2i/dim)",
        (ANGLES, ANGLES.replace("self.base**-exponents", "self.base**exponents")),
    ),
    Mistake(
        "exponents_from_one",
        "2.2",
        "base**(-2i/dim)",
        (EXPONENTS, EXPONENTS.replace("arange(0, self.dim, 2,", "arange(2, self.dim + 2, 2,")),
    ),
    Mistake(
        "linear_frequencies",
        "2.2",
        "base**(-2i/dim)",
        (ANGLES, ANGLES.replace("self.base**-exponents", "1 - exponents")),
    ),
    Mistake(
        "frequency_per_component",
        "2.2",
        "base**(-2i/dim)",
        (EXPONENTS, EXPONENTS.replace("arange(0, self.dim, 2,", "arange(0, self.dim, 1,")),
        (ANGLES, ANGLES.replace(".repeat(1, 2)", "")),
    ),
    Mistake("base_ignored", "2.2", "base 100:", (BASE, "        self.base = 10000\n"), only=True),
    Mistake(
        "base_of_the_first_module",
        "2.2",
        "base 500000",
        (BASE, "        self.base = min(base, 10000)\n"),
        only=True,
    ),
    Mistake(
        "exponents_clamped",
        "2.2",
        "dim 34",
        (ANGLES, ANGLES.replace("self.base**-exponents", "self.base ** -exponents.clamp(max=0.88)")),
        only=True,
    ),
    Mistake(
        "frequencies_clamped_to_1",
        "2.2",
        "base 0.9",
        (
            "torch.outer(positions, self.base**-exponents)",
            "torch.outer(positions, (self.base**-exponents).clamp(max=1))",
        ),
    ),
]
