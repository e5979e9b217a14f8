"""Nothing computed at all; slips of numerical stability (3.2) and of lengths (3.3)."""

from harness.model.bank import Mistake

APPLY = "        return _BlockwiseAttention.apply(Q, K, V, mask, causal, self.scale, self.block_size)\n"
LOWEST = "            maximum = torch.full_like(total, torch.finfo(work).min)\n"
PRODUCT = "                torch.bmm(q_rows, k[:, columns].to(work).mT, out=scores)\n"
MAXIMUM = "                new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))\n"
RESCALE = "                rescale = maximum.sub_(new_maximum).exp2_()\n"
TOTAL = "                total.mul_(rescale).add_(weights.sum(-1, keepdim=True))\n"
DIVIDE = "            accumulator.div_(total.masked_fill(total == 0, 1))\n"
RETURN = "        return result, natural\n"
DIAGONAL = "        self.diagonal = self.m - self.n if causal else None\n"
HIDE = "            scores.unflatten(0, self.leading).masked_fill_(self.mask[:, :, rows, columns] == 0, -math.inf)\n"

MISTAKES = [
    # Nothing at all
    Mistake(
        "zeros",
        ("3.2", "3.3", "3.4", "3.6", "3.7"),
        "output",
        (APPLY, "        return torch.zeros_like(Q), torch.zeros_like(Q[..., 0])\n"),
    ),
    Mistake(
        "identity", ("3.2", "3.3", "3.4", "3.6", "3.7"), "output", (APPLY, "        return Q * 1, Q[..., 0] * 1\n")
    ),
    Mistake("values", ("3.3", "3.4", "3.6"), "differ", (APPLY, "        return V * 1, K[..., 0] * 1\n")),
    Mistake("none", "3.4", "NoneType", (APPLY, "        return None\n")),
    Mistake("output_alone", "3.4", "pair (output, logsumexp)", (APPLY, APPLY.replace(")\n", ")[0]\n"))),
    # 3.2: numerical stability
    Mistake(
        "no_rescale",
        "3.2",
        "exp(old - new)",
        (
            "accumulator.mul_(rescale).baddbmm_(weights, v[:, columns].to(work))",
            "accumulator.baddbmm_(weights, v[:, columns].to(work))",
        ),
    ),
    Mistake("sum_not_rescaled", "3.2", "exp(old - new)", (TOTAL, TOTAL.replace("mul_(rescale).", ""))),
    Mistake(
        "rescaled_the_wrong_way",
        "3.2",
        "exp(old - new)",
        (RESCALE, "                rescale = new_maximum.sub(maximum).exp2_().nan_to_num(posinf=0.0)\n"),
    ),
    Mistake(
        "maximum_forgotten",
        "3.2",
        "exp(old - new)",
        (MAXIMUM, "                new_maximum = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(work).min)\n"),
        (RESCALE, "                rescale = torch.ones_like(maximum)\n"),
    ),
    Mistake(
        "maximum_of_the_first_block",
        "3.2",
        "300",
        (MAXIMUM, MAXIMUM.replace("\n", " if columns.start == 0 else maximum.clone()\n")),
    ),
    Mistake(
        "no_maximum",
        "3.2",
        "maximum",
        (LOWEST, "            maximum = torch.zeros_like(total)\n"),
        (MAXIMUM, "                new_maximum = torch.zeros_like(maximum)\n"),
    ),
    Mistake(
        "maximum_starts_at_zero",
        "3.2",
        "-100000",
        (LOWEST, "            maximum = torch.zeros_like(total)\n"),
        only=True,
    ),
    Mistake(
        "scores_clamped",
        "3.2",
        "scores change by 300",
        (PRODUCT, PRODUCT + "                scores.clamp_(-50, 50)\n"),
        only=True,
    ),
    Mistake("nan_for_masked_blocks", "3.2", "NaN", ("torch.finfo(work).min", "-math.inf"), only=True),
    Mistake("nan_for_masked_rows", "3.2", "NaN", (DIVIDE, "            accumulator.div_(total)\n"), only=True),
    Mistake(
        "nan_in_the_gradient_of_masked_rows",
        "3.2",
        "rows that causal leaves no key",
        (
            "shift = logsumexp[:, rows].nan_to_num(neginf=0.0)  # all scores of such a row are -inf",
            "shift = logsumexp[:, rows]",
        ),
        only=True,
    ),
    Mistake(
        "overflow_in_backward",
        "3.2",
        "not finite",
        (
            "torch.baddbmm(shift, q_rows, k_columns.mT, beta=-1, out=scores)",
            "torch.bmm(q_rows, k_columns.mT, out=scores)",
        ),
        ("weights = scores.exp2_()", "weights = scores.exp2_().div_(shift.exp2())"),
        only=True,
    ),
    Mistake("finite_fill", "3.2", "may attend to nothing", (HIDE, HIDE.replace("-math.inf", "-1e9")), only=True),
    Mistake(
        "mask_multiplies_scores",
        ("3.2", "3.4"),
        "mask",
        (HIDE, "            scores.unflatten(0, self.leading).mul_(self.mask[:, :, rows, columns])\n"),
    ),
    Mistake(
        "mask_after_the_maximum_and_sum",
        "3.2",
        "mask",
        (
            TOTAL,
            TOTAL
            + """\
                if mask is not None:
                    weights.unflatten(0, blocks.leading).mul_(blocks.mask[:, :, rows, columns])
""",
        ),
        (
            PRODUCT + "                blocks.hide_(scores, rows, columns)\n",
            PRODUCT
            + """\
                masked, blocks.mask = blocks.mask, None
                blocks.hide_(scores, rows, columns)
                blocks.mask = masked
""",
        ),
    ),
    Mistake("epsilon_in_the_sum", "3.7", "differ", (DIVIDE, "            accumulator.div_(total + 1e-8)\n"), only=True),
    # 3.3: lengths
    Mistake(
        "tail_dropped",
        "3.3",
        "M = 1 in blocks of 1",
        ("range(0, length, self.size)", "range(0, length - self.size + 1, self.size)"),
        only=True,
    ),
    Mistake(
        "tail_of_the_keys_dropped",
        "3.3",
        "M = 1 in blocks of 1",
        ("self.m if self.diagonal is None", "self.m // self.size * self.size if self.diagonal is None"),
        only=True,
    ),
    Mistake(
        "tail_padded_with_zeros",
        "3.3",
        "padding has no weight",
        (
            TOTAL,
            TOTAL
            + "                total.add_((blocks.size - (columns.stop - columns.start)) * new_maximum.neg().exp2())\n",
        ),
    ),
    Mistake(
        "lengths_must_be_multiples",
        "3.3",
        "multiple",
        (
            DIAGONAL,
            """\
        if self.n % self.size or self.m % self.size:
            raise ValueError('no multiple of the block size')
"""
            + DIAGONAL,
        ),
    ),
    Mistake(
        "block_larger_than_length_refused",
        "3.3",
        "block too large",
        (DIAGONAL, "        assert self.size <= max(self.n, self.m, 16), 'block too large'\n" + DIAGONAL),
    ),
    Mistake(
        "n_equals_m",
        "3.3",
        "the first 1 of 3 keys give alone",
        (
            "self.n, self.m, self.size = Q.size(2), K.size(2), size",
            "self.n, self.m, self.size = Q.size(2), min(Q.size(2), K.size(2)), size",
        ),
    ),
    Mistake(
        "causal_aligned_at_the_start",
        "3.3",
        "j <= i + M - N",
        (DIAGONAL, "        self.diagonal = 0 if causal else None\n"),
        only=True,
    ),
    Mistake(
        "one_query_squeezed",
        "3.3",
        "shape",
        (RETURN, "        return (result.squeeze(2) if result.size(2) == 1 else result), natural\n"),
    ),
    Mistake(
        "mask_cached_for_the_first_length",
        "3.3",
        "j <= i + M - N",
        (
            DIAGONAL,
            """\
        size = _Blocks.cached = getattr(_Blocks, 'cached', self.m)
        self.diagonal = size - self.n if causal else None
""",
        ),
    ),
    Mistake(
        "mask_ignored_in_a_single_block",
        "3.3",
        "what comes without the mask",
        (
            APPLY,
            """\
        if max(Q.size(2), K.size(2)) <= self.block_size:
            mask = None
"""
            + APPLY,
        ),
        only=True,
    ),
    Mistake(
        "output_memory_used_again",
        "3.3",
        "when later calls have been made",
        (
            RETURN,
            """\
        if not any(ctx.needs_input_grad):
            kept = _Blocks.kept = getattr(_Blocks, 'kept', {})
            result = kept.setdefault((result.shape, result.dtype, result.is_inference()), result).copy_(result)
"""
            + RETURN,
        ),
    ),
    Mistake(
        "mask_of_the_first_call",
        "3.3",
        "values differ",
        (
            APPLY,
            """\
        if mask is not None:
            mask = self.__dict__.setdefault('masks', {}).setdefault(tuple(mask.shape), mask)
"""
            + APPLY,
        ),
    ),
    Mistake(
        "positions_in_int16",
        "3.3",
        "int16 counts to 32767 only",
        (
            "            scores.add_(scores.new_full(scores.shape[1:], -math.inf).triu_(above))\n",
            """\
            keys = torch.arange(columns.start, columns.stop, device=scores.device).to(torch.int16)
            queries = torch.arange(rows.start, rows.stop, device=scores.device) + self.diagonal
            scores.masked_fill_(keys > queries[:, None], -math.inf)
""",
        ),
        only=True,
    ),
    Mistake(
        "logsumexp_bounded_in_backward",
        "3.2",
        "sums to 1 in each row",
        ("logsumexp[:, rows].nan_to_num(neginf=0.0)", "logsumexp[:, rows].clamp(min=-1e6)"),
        only=True,
    ),
    Mistake(
        "logsumexp_written_in_backward",
        "3.2",
        "backward changes the logsumexp",
        (
            "        ctx.mark_non_differentiable(natural)\n",
            "        ctx.mark_non_differentiable(natural)\n        ctx.natural = natural\n",
        ),
        (
            "        work = logsumexp.dtype\n",
            "        work = logsumexp.dtype\n        ctx.natural.nan_to_num_(neginf=0.0)\n",
        ),
        only=True,
    ),
]
