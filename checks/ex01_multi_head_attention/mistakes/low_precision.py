"""Wrong answers to ex01: half precision, and modules that are cast or moved (1.7)."""

from harness.model.bank import Mistake

SOFTMAX = "        weights = scores.softmax(dim=-1)\n"

MISTAKES = [
    Mistake("fill_of_1e9", "1.7", "overflow", ("torch.finfo(scores.dtype).min", "-1e9")),
    Mistake(
        "float32_results",
        "1.7",
        "dtype",
        (
            SOFTMAX,
            """\
        weights = scores.float().softmax(dim=-1) if scores.dtype.itemsize == 2 else scores.softmax(dim=-1)
""",
        ),
        (
            "        context = weights @ v  # [B, H, Lq, Dh]\n",
            "        context = (weights @ v.to(weights.dtype)).to(v.dtype)\n",
        ),
        only=True,
    ),
    Mistake(
        "softmax_by_bare_exp",
        "1.7",
        "not finite",
        (
            SOFTMAX,
            """\
        powers = scores.exp()
        weights = powers / powers.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
""",
        ),
    ),
    Mistake(
        "dtype_kept_from_the_first_call",
        "1.7",
        "cast",
        (
            "        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]\n",
            """\
        self._dtype = getattr(self, '_dtype', q.dtype)
        scores = self.compute_attention_scores(q.to(self._dtype), k.to(self._dtype)).to(q.dtype)
""",
        ),
        only=True,
    ),
    Mistake(
        "scale_rounded_by_a_cast",
        "1.7",
        "after a call in torch.float16",
        (
            "        self.num_heads = num_heads\n",
            """\
        self.num_heads = num_heads
        self.register_buffer('scale', torch.tensor((d_model // num_heads) ** -0.5, dtype=torch.float64))
""",
        ),
        (
            "        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]\n",
            """\
        scores = self.compute_attention_scores(q, k) * (self.scale * q.size(-1) ** 0.5).to(q.dtype)
""",
        ),
    ),
    Mistake(
        "a_constant_on_the_cpu",
        "1.7",
        "",
        (
            "        self.num_heads = num_heads\n",
            """\
        self.num_heads = num_heads
        self._scale = torch.ones(1)
""",
        ),
        (SOFTMAX, "        weights = (scores * self._scale.to(scores.dtype)).softmax(dim=-1)\n"),
        only=True,
    ),
    # Narrow code: right in the sizes, modes and masks that come first to mind.
    Mistake(
        "randomness_of_the_cpu",
        "1.7",
        "",
        (
            "        weights = self.dropout(weights)\n",
            """\
        if self.training and self.dropout.p > 0:
            kept = torch.rand(weights.shape) >= self.dropout.p
            weights = weights * kept.to(weights.dtype) / max(1 - self.dropout.p, 1e-9)
""",
        ),
        only=True,
    ),
    # What one situation hides: large scores of one sign, and what the first dtype leaves behind.
    Mistake(
        "scores_clamped_to_20",
        "1.7",
        "large scores",
        (SOFTMAX, "        weights = scores.clamp(max=20).softmax(dim=-1)\n"),
        only=True,
    ),
    Mistake(
        "additive_mask",
        "1.7",
        "not finite",
        (
            "        return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)\n",
            "        return scores + (1 - mask.to(scores.dtype)) * torch.finfo(scores.dtype).min\n",
        ),
        only=True,
    ),
    Mistake(
        "one_maximum_for_all_rows",
        "1.7",
        "",
        (
            SOFTMAX,
            """\
        powers = (scores - scores.detach().amax()).exp()
        weights = powers / powers.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
""",
        ),
    ),
    Mistake(
        "fill_of_the_first_dtype",
        "1.7",
        "",
        (
            "        return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)\n",
            """\
        self._lowest = getattr(self, '_lowest', torch.finfo(scores.dtype).min)
        return scores.masked_fill(mask == 0, self._lowest)
""",
        ),
    ),
    Mistake(
        "sum_of_weights_in_half_precision",
        "1.7",
        "4096 keys",
        (
            SOFTMAX,
            """\
        if scores.dtype.itemsize == 2 and scores.size(-1) > 512:
            powers = (scores.float() - scores.detach().float().amax(-1, keepdim=True)).exp()
            total = torch.zeros_like(powers[..., :1], dtype=scores.dtype)
            for part in powers.split(8, -1):
                total = total + part.sum(-1, keepdim=True).to(total.dtype)
            weights = (powers / total).to(scores.dtype)
        else:
            weights = scores.softmax(dim=-1)
""",
        ),
        only=True,
    ),
]
