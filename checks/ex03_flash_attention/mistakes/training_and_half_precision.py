"""Wrong or costly gradients (3.6), and rounding in half precision (3.7)."""

from harness.model.bank import Mistake

APPLY = "        return _BlockwiseAttention.apply(Q, K, V, mask, causal, self.scale, self.block_size)\n"
BACKWARD_BLOCKS = """\
        blocks = _Blocks(Q, K, mask, causal, block_size)
        buffer, grad_buffer"""
OUTPUT = "        output = torch.zeros_like(q, dtype=work)  # [BH, N, Dh]\n"
PRODUCT = "                torch.bmm(q_rows, k[:, columns].to(work).mT, out=scores)\n"
WEIGHTS = "                weights = scores.sub_(new_maximum).exp2_()\n"
TOTAL = "                total.mul_(rescale).add_(weights.sum(-1, keepdim=True))\n"
ACCUMULATE = "                accumulator.mul_(rescale).baddbmm_(weights, v[:, columns].to(work))\n"
SAVE = "        ctx.save_for_backward(Q, K, V, mask, result, logsumexp)\n"
ROW_SUM = "            row_sum = (grad_rows * output[:, rows]).sum(-1, keepdim=True)  # [BH, n, 1]\n"
AGAIN = "                weights = scores.exp2_()\n"
GRAD_Q = "                grad_q[:, rows].baddbmm_(grad_scores, k_columns, alpha=scale)\n"
GRAD_V = "                grad_v[:, columns].baddbmm_(weights.mT, grad_rows)\n"
GRAD_K = "                grad_k[:, columns].baddbmm_(grad_scores.mT, q_rows, alpha=1 / _LOG2_E)\n"
GRADS = "        return *(gradient.to(x.dtype).view(x.shape) for gradient, x in given), None, None, None, None\n"
ATTEND = "        output, _ = self.flash_attention_forward(Q, K, V, mask, causal)  # [B, H, N, Dh]\n"
AUTOGRAD_THROUGH_THE_LOOP = """\
        q, k, v = (x.flatten(0, 1) for x in (Q, K, V))
        work = torch.promote_types(Q.dtype, torch.float32)
        blocks = _Blocks(Q, K, mask, causal, self.block_size)
        outputs, logsumexps = [], []
        for rows in blocks.rows():
            q_rows = q[:, rows].to(work) * self.scale
            total = torch.zeros_like(q_rows[..., :1])
            maximum = torch.full_like(total, torch.finfo(work).min)
            accumulator = torch.zeros_like(q_rows)
            for columns in blocks.columns(rows):
                scores = q_rows @ k[:, columns].to(work).mT
                blocks.hide_(scores, rows, columns)
                new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True)).detach()
                weights = (scores - new_maximum).exp()
                rescale = (maximum - new_maximum).exp()
                total = total * rescale + weights.sum(-1, keepdim=True)
                accumulator = accumulator * rescale + weights @ v[:, columns].to(work)
                maximum = new_maximum
            outputs.append(accumulator / total.masked_fill(total == 0, 1))
            logsumexps.append((maximum + total.log()).detach())
        output = torch.cat(outputs, 1).to(Q.dtype).view(Q.shape)
        return output, torch.cat(logsumexps, 1).view(Q.shape[:3])
"""

MISTAKES = [
    # 3.6: training
    Mistake(
        "probabilities_kept_on_ctx",
        "3.6",
        "stay alive for backward",
        (OUTPUT, OUTPUT + "        ctx.kept = []\n"),
        (
            WEIGHTS,
            WEIGHTS
            + """\
                if any(ctx.needs_input_grad):
                    ctx.kept.append(weights.clone())
""",
        ),
    ),
    Mistake(
        "hidden_pairs_kept_on_ctx",
        "3.6",
        "stay alive for backward",
        (OUTPUT, OUTPUT + "        ctx.kept = []\n"),
        (
            WEIGHTS,
            """\
                if causal and mask is not None and any(ctx.needs_input_grad):
                    ctx.kept.append(scores == -math.inf)
"""
            + WEIGHTS,
        ),
        wasteful=True,
    ),
    Mistake("autograd_through_the_loop", "3.6", "stay alive for backward", (APPLY, AUTOGRAD_THROUGH_THE_LOOP)),
    Mistake(
        "backward_all_at_once",
        "3.6",
        "N·M is",
        (BACKWARD_BLOCKS, BACKWARD_BLOCKS.replace("block_size)", "max(Q.size(2), K.size(2)))")),
        wasteful=True,
    ),
    Mistake(
        "no_gradient",
        "3.6",
        "does not",
        (APPLY, APPLY.replace("Q, K, V,", "Q.detach(), K.detach(), V.detach(),")),
        only=True,
    ),
    Mistake(
        "no_gradient_for_keys",
        "3.6",
        "gradient of K",
        (
            GRADS,
            """\
        q_grad, _, v_grad = (gradient.to(x.dtype).view(x.shape) for gradient, x in given)
        return q_grad, None, v_grad, None, None, None, None
""",
        ),
    ),
    Mistake(
        "backward_without_scale",
        "3.6",
        "2.236 times",
        (GRAD_Q, GRAD_Q.replace("alpha=scale", "alpha=1")),
        (GRAD_K, GRAD_K.replace("1 / _LOG2_E", "1 / (scale * _LOG2_E)")),
        only=True,
    ),
    Mistake(
        "query_gradient_without_scale",
        "3.6",
        "gradient of Q",
        (GRAD_Q, GRAD_Q.replace("alpha=scale", "alpha=1")),
        only=True,
    ),
    Mistake(
        "backward_without_row_sum",
        "3.6",
        "rowsum(dO ∘ O)",
        (ROW_SUM, ROW_SUM + "            row_sum = torch.zeros_like(row_sum)\n"),
        only=True,
    ),
    Mistake(
        "row_sum_of_the_output_alone",
        "3.6",
        "rowsum(dO ∘ O)",
        (ROW_SUM, "            row_sum = output[:, rows].to(work).sum(-1, keepdim=True)\n"),
        only=True,
    ),
    Mistake(
        "backward_without_logsumexp",
        "3.6",
        "P = (3/4, 1/4)",
        (
            "shift = logsumexp[:, rows].nan_to_num(neginf=0.0)  # all scores of such a row are -inf",
            "shift = torch.zeros_like(logsumexp[:, rows])",
        ),
    ),
    Mistake(
        "key_gradient_of_the_last_block_of_queries",
        "3.6",
        "gradient of K",
        (GRAD_K, "                grad_k[:, columns] = grad_scores.mT @ q_rows / _LOG2_E\n"),
        only=True,
    ),
    Mistake(
        "value_gradient_not_transposed",
        "3.6",
        "gradient of V",
        (
            "grad_v[:, columns].baddbmm_(weights.mT, grad_rows)",
            "grad_v[:, columns].baddbmm_(weights if weights.size(1) == weights.size(2) else weights.mT, grad_rows)",
        ),
    ),
    Mistake(
        "backward_ignores_causal",
        "3.6",
        "causal",
        (BACKWARD_BLOCKS, BACKWARD_BLOCKS.replace("causal,", "False,")),
        only=True,
    ),
    Mistake(
        "backward_ignores_the_mask", "3.6", "mask", (BACKWARD_BLOCKS, BACKWARD_BLOCKS.replace("K, mask,", "K, None,"))
    ),
    Mistake(
        "backward_drops_the_tail",
        "3.6",
        "N = 6",
        (
            "        buffer, grad_buffer",
            """\
        blocks._slices = lambda n: (slice(i, i + block_size) for i in range(0, n - block_size + 1, block_size))
        buffer, grad_buffer""",
        ),
        only=True,
    ),
    Mistake(
        "backward_of_the_last_call",
        "3.6",
        "another call",
        (SAVE, "        _BlockwiseAttention.saved = Q, K, V, mask, result, logsumexp\n"),
        (
            "Q, K, V, mask, result, logsumexp = ctx.saved_tensors",
            "Q, K, V, mask, result, logsumexp = _BlockwiseAttention.saved",
        ),
    ),
    Mistake(
        "backward_spoils_what_was_saved",
        "3.6",
        "inplace operation",
        (AGAIN, AGAIN + "                logsumexp[:, rows] += 1 if columns.stop == blocks.m else 0\n"),
        only=True,
    ),
    Mistake("output_gradient_written_to", "3.6", "written-to", (GRADS, "        grads[0].mul_(0.5)\n" + GRADS)),
    Mistake(
        "contiguous_output_gradient_only",
        "3.6",
        "view",
        (
            "        q, k, v, output, grad = (x.flatten(0, 1) for x in (Q, K, V, result, grads[0]))\n",
            """\
        q, k, v, output = (x.flatten(0, 1) for x in (Q, K, V, result))
        grad = grads[0].view(q.shape)
""",
        ),
        only=True,
    ),
    Mistake(
        "no_gradient_in_eval",
        "3.6",
        "gradient",
        (
            ATTEND,
            "        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):\n    " + ATTEND,
        ),
        only=True,
    ),
    Mistake(
        "integer_mask_lost_in_backward",
        "3.6",
        "a mask of torch.int32",
        (
            BACKWARD_BLOCKS,
            "        mask = None if mask is not None and mask.dtype == torch.int32 else mask\n" + BACKWARD_BLOCKS,
        ),
    ),
    Mistake(
        "float32_copies_kept",
        "3.6",
        "bfloat16",
        (SAVE, SAVE + "        ctx.copies = [x.to(work) for x in (Q, K, V, result)]\n"),
        wasteful=True,
    ),
    Mistake(
        "float32_copies_of_strided_inputs_kept",
        "3.6",
        "bfloat16",
        (
            SAVE,
            """\
        kind = Q.dtype
        if kind != work and not Q.is_contiguous():
            Q, K, V = (x.contiguous().to(work) for x in (Q, K, V))
"""
            + SAVE,
        ),
        ("ctx.options = causal, scale, block_size", "ctx.options = causal, scale, block_size, kind"),
        ("causal, scale, block_size = ctx.options", "causal, scale, block_size, kind = ctx.options"),
        (GRADS, GRADS.replace("x.dtype", "kind")),
    ),
    # 3.7: half precision
    *(
        Mistake(
            f"gradient_of_{name}_in_half_precision",
            "3.7",
            f"blocks of {over}: gradient of {name[0].upper()}",
            (line, line + f"                grad_{name[0]}.copy_(grad_{name[0]}.to(Q.dtype))\n"),
            only=True,
        )
        for name, line, over in (
            ("queries", GRAD_Q, "keys"),
            ("keys", GRAD_K, "queries"),
            ("values", GRAD_V, "queries"),
        )
    ),
    Mistake(
        "computes_in_half_precision",
        "3.7",
        "times that of",
        ("work = torch.promote_types(Q.dtype, torch.float32)", "work = Q.dtype"),
        only=True,
    ),
    Mistake(
        "scores_in_half_precision",
        "3.7",
        "float32",
        (PRODUCT, PRODUCT + "                scores.copy_(scores.to(Q.dtype))\n"),
        only=True,
    ),
    Mistake(
        "scaled_in_half_precision",
        "3.7",
        "before scaling",
        (
            "q[:, rows].to(work) * (scale * _LOG2_E)  # [BH, n, Dh]\n            accumulator",
            "(q[:, rows] * (scale * _LOG2_E)).to(work)  # [BH, n, Dh]\n            accumulator",
        ),
        only=True,
    ),
    Mistake(
        "accumulator_in_half_precision",
        "3.7",
        "accumulator in float32",
        (ACCUMULATE, ACCUMULATE + "                accumulator.copy_(accumulator.to(Q.dtype))\n"),
        only=True,
    ),
    Mistake(
        "sum_in_half_precision",
        "3.7",
        "float32",
        (TOTAL, TOTAL + "                total.copy_(total.to(Q.dtype))\n"),
        only=True,
    ),
    Mistake(
        "logsumexp_in_half_precision",
        "3.7",
        "float32 or better",
        ("(logsumexp / _LOG2_E).view(Q.shape[:3])", "(logsumexp / _LOG2_E).view(Q.shape[:3]).to(Q.dtype)"),
        only=True,
    ),
    Mistake(
        "positions_in_half_precision",
        "3.7",
        "positions",
        (
            "        self.diagonal = self.m - self.n if causal else None\n",
            "        self.diagonal = self.m - self.n if causal else None\n        self.kind = Q.dtype\n",
        ),
        (
            """\
            above = rows.start + self.diagonal + 1 - columns.start
            scores.add_(scores.new_full(scores.shape[1:], -math.inf).triu_(above))
""",
            """\
            i = torch.arange(rows.start, rows.stop, device=scores.device).to(self.kind) + self.diagonal
            j = torch.arange(columns.start, columns.stop, device=scores.device).to(self.kind)
            scores.masked_fill_(j > i[:, None], -math.inf)
""",
        ),
        only=True,
    ),
    Mistake(
        "output_in_float32",
        "3.7",
        "torch.float32",
        ("result = output.to(Q.dtype).view(Q.shape)", "result = output.view(Q.shape)"),
    ),
    Mistake(
        "weights_times_values_in_half_precision",
        "3.7",
        "half",
        (ACCUMULATE, "                accumulator.mul_(rescale).add_(torch.bmm(weights.to(v.dtype), v[:, columns]))\n"),
        only=True,
    ),
    Mistake(
        "weights_times_values_in_half_precision_with_a_mask",
        "3.7",
        "multiplies in half precision",
        (
            ACCUMULATE,
            """\
                narrow = work if mask is None or any(ctx.needs_input_grad) else v.dtype
                accumulator.mul_(rescale).add_(torch.bmm(weights.to(narrow), v[:, columns].to(narrow)))
""",
        ),
        only=True,
    ),
    Mistake(
        "backward_in_half_precision",
        "3.7",
        "multiplies in half precision",
        (
            "        work = logsumexp.dtype\n",
            """\
        work = Q.dtype
        logsumexp = logsumexp.to(work)
""",
        ),
        only=True,
    ),
]
