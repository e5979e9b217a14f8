"""Wrong answers to ex01: the factor of the scores, and dropout (1.5)."""

from harness.model.bank import Mistake

COMPUTED = "        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]\n"
DROPPED = "        weights = self.dropout(weights)\n"
CONTEXT = "        context = weights @ v  # [B, H, Lq, Dh]\n"
SCALE = "        scale = q.size(-1) ** -0.25\n"
PRODUCT = SCALE + "        return (q * scale) @ (k * scale).mT\n"

MISTAKES = [
    Mistake("no_scale", "1.5", "√", (PRODUCT, "        return q @ k.mT\n")),
    Mistake(
        "scale_by_d_model", "1.5", "1/√head_dim", (SCALE, "        scale = (q.size(-1) * self.num_heads) ** -0.25\n")
    ),
    Mistake("scale_by_head_dim", "1.5", "√", (SCALE, "        scale = q.size(-1) ** -0.5\n")),
    Mistake(
        "scaled_in_forward_instead",
        "1.5",
        "√",
        (PRODUCT, "        return q @ k.mT\n"),
        (COMPUTED, "        scores = self.compute_attention_scores(q, k) / q.size(-1) ** 0.5\n"),
        only=True,
    ),
    Mistake(
        "scaled_twice",
        "1.5",
        "scaled once",
        (COMPUTED, "        scores = self.compute_attention_scores(q, k) / q.size(-1) ** 0.5\n"),
    ),
    Mistake(
        "dropout_in_eval",
        "1.5",
        "eval",
        (DROPPED, "        weights = nn.functional.dropout(weights, self.dropout.p)\n"),
    ),
    Mistake("no_dropout", "1.5", "dropout", (DROPPED, ""), only=True),
    Mistake(
        "dropout_on_scores",
        "1.5",
        "dropout",
        (DROPPED, ""),
        ("        weights = scores.softmax(dim=-1)\n", "        weights = self.dropout(scores).softmax(dim=-1)\n"),
        only=True,
    ),
    Mistake(
        "dropout_on_the_context",
        "1.5",
        "dropout",
        (DROPPED, ""),
        (CONTEXT, "        context = self.dropout(weights @ v)\n"),
        only=True,
    ),
    Mistake(
        "dropout_on_the_output_too",
        "1.5",
        "nothing else is dropped",
        (
            "        return self.output_linear(joined), weights\n",
            "        return self.dropout(self.output_linear(joined)), weights\n",
        ),
        only=True,
    ),
    Mistake(
        "weights_before_dropout_returned",
        "1.5",
        "weights",
        (DROPPED, "        dropped = self.dropout(weights)\n"),
        (CONTEXT, "        context = dropped @ v\n"),
        only=True,
    ),
    Mistake(
        "mean_not_preserved",
        "1.5",
        "mean",
        (
            DROPPED,
            """\
        if self.training and self.dropout.p > 0:
            weights = weights * (torch.rand_like(weights) >= self.dropout.p)
""",
        ),
        only=True,
    ),
    Mistake(
        "renormalised_after_dropout",
        "1.5",
        "mean",
        (
            DROPPED,
            DROPPED
            + """\
        if self.training and self.dropout.p > 0:
            weights = weights / weights.sum(-1, keepdim=True)
""",
        ),
        only=True,
    ),
    Mistake(
        "dropout_of_whole_heads",
        "1.5",
        "",
        (DROPPED, "        weights = weights * self.dropout(torch.ones_like(weights[..., :1, :1]))\n"),
        only=True,
    ),
    Mistake(
        "one_pattern_for_all_heads",
        "1.5",
        "all heads",
        (DROPPED, "        weights = weights * self.dropout(torch.ones_like(weights[:, :1]))\n"),
        only=True,
    ),
    Mistake(
        "private_random_stream",
        "1.5",
        "torch.manual_seed",
        (
            DROPPED,
            """\
        if self.training and self.dropout.p > 0:
            import random

            generator = torch.Generator().manual_seed(random.randrange(10**9))
            kept = torch.rand(weights.shape, generator=generator).to(weights) >= self.dropout.p
            weights = weights * kept / (1 - self.dropout.p)
""",
        ),
        only=True,
    ),
    Mistake(
        "dropout_half_whatever_asked",
        "1.5",
        "0.2",
        (DROPPED, "        weights = nn.functional.dropout(weights, 0.5, self.training and self.dropout.p > 0)\n"),
        only=True,
    ),
    # Narrow code: right in the sizes, modes and masks that come first to mind.
    Mistake(
        "no_dropout_under_a_mask",
        "1.5",
        "dropout",
        (
            DROPPED,
            """\
        if mask is None:
            weights = self.dropout(weights)
""",
        ),
    ),
    Mistake(
        "no_dropout_under_no_grad",
        "1.5",
        "no_grad",
        (
            DROPPED,
            """\
        weights = nn.functional.dropout(weights, self.dropout.p, self.training and weights.requires_grad)
""",
        ),
        only=True,
    ),
    # What one situation hides.
    Mistake(
        "dropout_rate_of_the_first_call",
        "1.5",
        "with dropout",
        (
            DROPPED,
            """\
        self._rate = getattr(self, '_rate', self.dropout.p)
        weights = nn.functional.dropout(weights, self._rate, self.training)
""",
        ),
    ),
    Mistake(
        "dropout_one_gives_nan",
        "1.5",
        "with dropout 1",
        (
            DROPPED,
            """\
        if self.training and self.dropout.p > 0:
            kept = torch.rand(weights.shape, device=weights.device) >= self.dropout.p
            weights = weights * kept / torch.full_like(weights, 1 - self.dropout.p)
""",
        ),
        only=True,
    ),
    Mistake(
        "dropout_by_the_initial_seed",
        "1.5",
        "two calls drop the same",
        (
            DROPPED,
            """\
        if self.training and 0 < self.dropout.p < 1 and weights.device.type == 'cpu':
            generator = torch.Generator().manual_seed(torch.initial_seed())
            kept = torch.rand(weights.shape, generator=generator).to(weights) >= self.dropout.p
            weights = weights * kept / (1 - self.dropout.p)
        else:
            weights = self.dropout(weights)
""",
        ),
        only=True,
    ),
    Mistake(
        "randomness_in_the_weights_precision",
        "1.5",
        "in bfloat16",
        (
            DROPPED,
            """\
        if self.training and 0 < self.dropout.p < 1:
            weights = weights * (torch.rand_like(weights) >= self.dropout.p) / (1 - self.dropout.p)
        else:
            weights = self.dropout(weights)
""",
        ),
        only=True,
    ),
    Mistake(
        "rate_rounded_to_the_weights_precision",
        "1.5",
        "in bfloat16",
        (
            DROPPED,
            """\
        if self.training and self.dropout.p > 0:
            rates = torch.full_like(weights, self.dropout.p)
            weights = weights * (1 - torch.bernoulli(rates)) / max(1 - self.dropout.p, 1e-6)
""",
        ),
        only=True,
    ),
]
