"""Wrong answers to ex01: too large tensors, expanded masks, and what stays alive (1.3)."""

from harness.model.bank import Mistake

APPLIED = "            scores = self.apply_mask(scores, mask)\n"
SOFTMAX = "        weights = scores.softmax(dim=-1)\n"
RETURN = "        return self.output_linear(joined), weights\n"
PRODUCT = """\
        scale = q.size(-1) ** -0.25
        return (q * scale) @ (k * scale).mT
"""

MISTAKES = [
    Mistake(
        "broadcast_product",
        "1.3",
        "multiply matrices",
        (PRODUCT, "        return (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / q.size(-1) ** 0.5\n"),
        wasteful=True,
    ),
    Mistake(
        "broadcast_context",
        "1.3",
        "multiply matrices",
        (
            "        context = weights @ v  # [B, H, Lq, Dh]\n",
            "        context = (weights.unsqueeze(-1) * v.unsqueeze(2)).sum(3)\n",
        ),
        wasteful=True,
    ),
    Mistake(
        "mask_repeated",
        "1.3",
        "is copied to",
        (APPLIED, "            mask = mask.expand(scores.shape).contiguous()\n" + APPLIED),
        wasteful=True,
    ),
    Mistake(
        "mask_as_full_bias",
        "1.3",
        "is copied to",
        (
            "        return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)\n",
            """\
        lowest = torch.finfo(scores.dtype).min
        return scores + torch.zeros_like(scores).masked_fill(mask == 0, lowest)
""",
        ),
    ),
    Mistake(
        "six_scores_alive",
        "1.3",
        "alive at once",
        (
            SOFTMAX,
            """\
        steps = [scores * 1, scores * 1, scores * 1, scores * 1]
        weights = sum(steps[1:], steps[0] * 0 + steps[1] * 0).mul(1 / 3).softmax(dim=-1)
""",
        ),
    ),
    Mistake(
        "five_scores_kept",
        "1.3",
        "kept for backward",
        (SOFTMAX, "        weights = (scores.exp().exp().log().log()).softmax(dim=-1).sqrt().square()\n"),
    ),
    Mistake(
        "weights_kept_in_the_module",
        "1.3",
        "stay alive",
        (RETURN, "        self.last_weights = weights.detach()\n" + RETURN),
        wasteful=True,
    ),
    Mistake(
        "query_kept_in_the_module",
        "1.3",
        "query stays alive",
        (RETURN, "        self.last_query = query\n" + RETURN),
        wasteful=True,
    ),
    # Narrow code: right in the sizes, modes and masks that come first to mind.
    Mistake(
        "last_weights_in_a_buffer",
        "1.3",
        "stay alive",
        (
            RETURN,
            """\
        if getattr(self, '_last', None) is None or self._last.shape != weights.shape:
            self._last = torch.empty_like(weights, requires_grad=False)
        self._last.copy_(weights.detach())
"""
            + RETURN,
        ),
    ),
    Mistake(
        "weights_kept_with_dropout",
        "1.3",
        "stay alive",
        (RETURN, "        self._last = weights if self.dropout.p > 0 else None\n" + RETURN),
        wasteful=True,
    ),
    Mistake(
        "broadcast_product_in_eval",
        "1.3",
        "multiply matrices",
        (
            PRODUCT,
            """\
        if not self.training:
            return (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / q.size(-1) ** 0.5
"""
            + PRODUCT,
        ),
        wasteful=True,
    ),
    Mistake(
        "mask_repeated_per_head",
        "1.3",
        "is copied to",
        (
            APPLIED,
            """\
            if mask.size(1) > 1:
                mask = mask.expand(scores.shape).contiguous()
"""
            + APPLIED,
        ),
        wasteful=True,
    ),
    Mistake(
        "mask_repeated_in_eval",
        "1.3",
        "is copied to",
        (
            APPLIED,
            """\
            if not self.training:
                mask = mask.expand(scores.shape).contiguous()
"""
            + APPLIED,
        ),
        wasteful=True,
    ),
    Mistake(
        "float_mask_repeated",
        "1.3",
        "is copied to",
        (
            APPLIED,
            """\
            if mask.dtype != torch.bool:
                mask = mask.expand(scores.shape).contiguous()
"""
            + APPLIED,
        ),
        wasteful=True,
    ),
    # What one situation hides.
    Mistake(
        "weights_kept_at_inference",
        "1.3",
        "stay alive",
        (
            RETURN,
            """\
        if torch.is_inference_mode_enabled():
            self._history = [weights]
"""
            + RETURN,
        ),
        wasteful=True,
    ),
    Mistake(
        "weights_kept_in_a_closure",
        "1.3",
        "stay alive",
        (RETURN, "        self.entropy = lambda: -(weights * weights.log()).sum(-1)\n" + RETURN),
        wasteful=True,
    ),
    Mistake(
        "five_scores_kept_in_eval",
        "1.3",
        "in eval",
        (
            SOFTMAX,
            """\
        if not self.training:
            scores = scores + 0 * scores.tanh().sigmoid().sin()
"""
            + SOFTMAX,
        ),
        wasteful=True,
    ),
    Mistake(
        "mask_of_queries_repeated",
        "1.3",
        "is copied to",
        (
            APPLIED,
            """\
            if mask.size(-1) == 1:
                mask = mask.expand(scores.shape).contiguous()
"""
            + APPLIED,
        ),
        wasteful=True,
    ),
    Mistake(
        "broadcast_product_for_many_queries",
        "1.3",
        "multiply matrices",
        (
            PRODUCT,
            """\
        if q.size(2) > 256:
            return (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / q.size(-1) ** 0.5
"""
            + PRODUCT,
        ),
        wasteful=True,
    ),
    Mistake(
        "refusal_kept_in_the_module",
        "1.3",
        "query stays alive",
        (
            "            self._check_mask(mask, scores_shape)\n",
            """\
            try:
                self._check_mask(mask, scores_shape)
            except ValueError as error:
                self.last_error = error
                raise
""",
        ),
        only=True,
    ),
    Mistake(
        "query_kept_until_the_mask_fits",
        "1.3",
        "query stays alive",
        (
            "            self._check_mask(mask, scores_shape)\n",
            """\
            self._pending = query
            self._check_mask(mask, scores_shape)
            del self._pending
""",
        ),
        only=True,
    ),
]
