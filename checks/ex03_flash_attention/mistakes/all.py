"""Wrong answers to ex03 that its checks must catch."""

from harness.model.bank import Mistake as _New


def Mistake(name, caught_by, edits, says, only=False):  # type: ignore
    return _New(name, caught_by, says, *edits, only=only)


APPLY = "        return _BlockwiseAttention.apply(Q, K, V, mask, causal, self.scale, self.block_size)\n"
FORWARD_BLOCKS = "        blocks = _Blocks(Q, K, mask, causal, block_size)\n        buffer = blocks.new_buffer(work)\n"
BACKWARD_BLOCKS = "        blocks = _Blocks(Q, K, mask, causal, block_size)\n        buffer, grad_buffer"
OUTPUT = "        output = torch.zeros_like(q, dtype=work)  # [BH, N, Dh]\n"
Q_ROWS = "            q_rows = q[:, rows].to(work) * (scale * _LOG2_E)  # [BH, n, Dh]\n"
FORWARD_Q_ROWS = Q_ROWS + "            accumulator = output[:, rows]\n"
LOWEST = "            maximum = torch.full_like(total, torch.finfo(work).min)\n"
PRODUCT = "                torch.bmm(q_rows, k[:, columns].to(work).mT, out=scores)\n"
FORWARD_HIDE = PRODUCT + "                blocks.hide_(scores, rows, columns)\n"
MAXIMUM = "                new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))\n"
WEIGHTS = "                weights = scores.sub_(new_maximum).exp2_()\n"
RESCALE = "                rescale = maximum.sub_(new_maximum).exp2_()\n"
TOTAL = "                total.mul_(rescale).add_(weights.sum(-1, keepdim=True))\n"
ACCUMULATE = "                accumulator.mul_(rescale).baddbmm_(weights, v[:, columns].to(work))\n"
DIVIDE = "            accumulator.div_(total.masked_fill(total == 0, 1))\n"
LOGSUMEXP = "            logsumexp[:, rows] = maximum + total.log2()\n"
RESULT = "        result = output.to(Q.dtype).view(Q.shape)\n"
SAVE = "        ctx.save_for_backward(Q, K, V, mask, result, logsumexp)\n"
NATURAL = "        natural = (logsumexp / _LOG2_E).view(Q.shape[:3])\n"
RETURN = "        return result, natural\n"
LOAD = "        Q, K, V, mask, result, logsumexp = ctx.saved_tensors\n"
GRAD_ROWS = "            grad_rows = grad[:, rows].to(work)  # [BH, n, Dh]\n"
ROW_SUM = "            row_sum = (grad_rows * output[:, rows]).sum(-1, keepdim=True)  # [BH, n, 1]\n"
SHIFT = "            shift = logsumexp[:, rows].nan_to_num(neginf=0.0)  # all scores of such a row are -inf\n"
AGAIN = "                weights = scores.exp2_()\n"
GRAD_V = "                grad_v[:, columns].baddbmm_(weights.mT, grad_rows)\n"
GRAD_Q = "                grad_q[:, rows].baddbmm_(grad_scores, k_columns, alpha=scale)\n"
GRAD_K = "                grad_k[:, columns].baddbmm_(grad_scores.mT, q_rows, alpha=1 / _LOG2_E)\n"
GRADS = "        return *(gradient.to(x.dtype).view(x.shape) for gradient, x in given), None, None, None, None\n"
DIAGONAL = "        self.diagonal = self.m - self.n if causal else None\n"
EXPANDED = "        self.mask = None if mask is None else mask.expand(*self.leading, self.n, self.m)\n"
ROWS = "        return self._slices(self.n)\n"
COLUMNS = "        return self._slices(self.m if self.diagonal is None else min(self.m, rows.stop + self.diagonal))\n"
CROSSING = "        if self.diagonal is not None and columns.stop > rows.start + self.diagonal + 1:\n"
ABOVE = "            above = rows.start + self.diagonal + 1 - columns.start\n"
HIDE = "            scores.unflatten(0, self.leading).masked_fill_(self.mask[:, :, rows, columns] == 0, -math.inf)\n"
BUFFER = "        return torch.empty(self.leading.numel() * n * m, dtype=dtype, device=self.device)\n"
SLICES = "        return (slice(start, min(start + self.size, length)) for start in range(0, length, self.size))\n"
CHECK = "            self._check_mask(mask, (x.size(0), self.num_heads, x.size(1), x.size(1)))\n"
CHECKED = (
    "        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, shape, strict=True))\n"
)
HEADS = "        Q, K, V = (linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in projections)\n"
PROJECTIONS = "        projections = (self.q_proj, self.k_proj, self.v_proj)\n"
ATTEND = "        output, _ = self.flash_attention_forward(Q, K, V, mask, causal)  # [B, H, N, Dh]\n"
JOIN = "        return self.o_proj(output.transpose(1, 2).flatten(start_dim=2))  # [B, N, D]\n"
SCALE = "        self.scale = (d_model // num_heads) ** -0.5\n"
ROW_PER_LENGTH = "    return [_compare(length, d_model, num_heads) for length in seq_lengths]\n"
MODULE = "    attention = FlashAttention(d_model, num_heads)\n"
X = "    x = torch.randn(1, length, d_model)\n"
SIDES = "    standard, flash = partial(_standard_attention, attention, x), partial(attention, x)\n"
STANDARD_SECONDS = '        "standard_seconds": _seconds(standard),\n'
FLASH_SECONDS = '        "flash_seconds": _seconds(flash),\n'
STANDARD_PEAK = '        "standard_peak_bytes": peak_bytes(standard),\n'
FLASH_PEAK = '        "flash_peak_bytes": peak_bytes(flash),\n'
ERROR = '        "max_abs_error": (standard() - flash()).abs().max().item(),\n'
STANDARD_WEIGHTS = "    weights = (q @ k.mT * attention.scale).softmax(-1)  # [B, H, N, N]\n"
STANDARD_JOIN = "    return attention.o_proj((weights @ v).transpose(1, 2).flatten(start_dim=2))  # [B, N, D]\n"

ALL_AT_ONCE = """        scores = (Q @ K.mT * self.scale).to(torch.promote_types(Q.dtype, torch.float32))
        allowed = torch.ones(Q.size(2), K.size(2), dtype=torch.bool, device=Q.device)
        if causal:
            allowed = allowed.tril(K.size(2) - Q.size(2))
        if mask is not None:
            allowed = allowed & (mask != 0)
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1) * allowed
        logsumexp = scores.masked_fill(~allowed, -math.inf).logsumexp(-1)
        return (weights @ V.to(weights.dtype)).to(Q.dtype), logsumexp.detach()
"""
PREBUILT = ALL_AT_ONCE.replace(
    "        return (weights @ V.to(weights.dtype)).to(Q.dtype), logsumexp.detach()\n",
    "        output = nn.functional.scaled_dot_product_attention(Q, K, V, attn_mask=allowed.expand(scores.shape))\n"
    "        return output, logsumexp.detach()\n",
)
AUTOGRAD_THROUGH_THE_LOOP = """        q, k, v = (x.flatten(0, 1) for x in (Q, K, V))
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
MEAN_OF_BLOCKS = "                weights = scores.softmax(-1)\n                total.add_(1)\n                accumulator.baddbmm_(weights, v[:, columns].to(work))\n"

MISTAKES = [
    # Nothing at all.
    Mistake("zeros", ("3.2", "3.3", "3.4", "3.6", "3.7"), [(APPLY, "        return torch.zeros_like(Q), torch.zeros_like(Q[..., 0])\n")], says="output"),
    Mistake("identity", ("3.2", "3.3", "3.4", "3.6", "3.7"), [(APPLY, "        return Q * 1, Q[..., 0] * 1\n")], says="output"),
    Mistake("values", ("3.3", "3.4", "3.6"), [(APPLY, "        return V * 1, K[..., 0] * 1\n")], says="differ"),
    Mistake("none", "3.4", [(APPLY, "        return None\n")], says="NoneType"),
    Mistake("output_alone", "3.4", [(APPLY, APPLY.replace(")\n", ")[0]\n"))], says="pair (output, logsumexp)"),
    # 3.1
    Mistake("standard_attention", "3.1", [(APPLY, ALL_AT_ONCE)], says="N·M is"),
    Mistake("mask_expanded_in_memory", "3.1", [(EXPANDED, EXPANDED.replace("self.m)\n", "self.m).contiguous()\n"))], says="an expanded view costs nothing"),
    Mistake("mask_as_full_bias", "3.1", [(EXPANDED, EXPANDED.replace("self.m)\n", "self.m) != 0\n"))], says="an expanded view costs nothing"),
    Mistake("causal_mask_of_all_pairs", "3.1", [(DIAGONAL, DIAGONAL + "        if causal:\n            tril = torch.ones(self.n, self.m, device=Q.device).tril(self.m - self.n)\n            mask = tril if mask is None else mask * tril\n")], says="causal"),
    Mistake("query_blocks_times_all_keys", "3.1", [(COLUMNS, "        stop = self.m if self.diagonal is None else min(self.m, rows.stop + self.diagonal)\n        return iter([slice(0, stop)] if stop > 0 else [])\n"), (BUFFER, BUFFER.replace("n * m", "n * self.m"))], says="block_size·M is", only=True),
    Mistake("all_queries_times_key_blocks", "3.1", [(ROWS, "        return iter([slice(0, self.n)])\n"), (BUFFER, BUFFER.replace("n * m", "self.n * m"))], says="at most 2048"),
    Mistake("block_size_ignored", "3.1", [(DIAGONAL, "        self.size = 128\n" + DIAGONAL)], says="block_size = 2"),
    Mistake("weights_kept_at_inference", "3.1", [(OUTPUT, OUTPUT + "        kept = []\n"), (WEIGHTS, WEIGHTS + "                kept.append(weights.clone())\n")], says="2.2 times"),
    Mistake("mask_converted_whole", "3.1", [(EXPANDED, EXPANDED.replace("mask.expand", "mask.bool().expand"))], says="flash_attention_forward, mask: a tensor", only=True),
    # 3.2
    Mistake("no_rescale", "3.2", [(ACCUMULATE, ACCUMULATE.replace("mul_(rescale).", ""))], says="exp(old - new)"),
    Mistake("sum_not_rescaled", "3.2", [(TOTAL, TOTAL.replace("mul_(rescale).", ""))], says="exp(old - new)"),
    Mistake("rescaled_the_wrong_way", "3.2", [(RESCALE, "                rescale = new_maximum.sub(maximum).exp2_().nan_to_num(posinf=0.0)\n")], says="exp(old - new)"),
    Mistake("maximum_forgotten", "3.2", [(MAXIMUM, "                new_maximum = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(work).min)\n"), (RESCALE, "                rescale = torch.ones_like(maximum)\n")], says="exp(old - new)"),
    Mistake("maximum_of_the_first_block", "3.2", [(MAXIMUM, "                new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True)) if columns.start == 0 else maximum.clone()\n")], says="300"),
    Mistake("no_maximum", "3.2", [(LOWEST, "            maximum = torch.zeros_like(total)\n"), (MAXIMUM, "                new_maximum = torch.zeros_like(maximum)\n")], says="maximum"),
    Mistake("maximum_starts_at_zero", "3.2", [(LOWEST, "            maximum = torch.zeros_like(total)\n")], says="-100000", only=True),
    Mistake("scores_clamped", "3.2", [(PRODUCT, PRODUCT + "                scores.clamp_(-50, 50)\n")], says="scores change by 300", only=True),
    Mistake("nan_for_masked_blocks", "3.2", [(LOWEST, LOWEST.replace("torch.finfo(work).min", "-math.inf"))], says="NaN", only=True),
    Mistake("nan_for_masked_rows", "3.2", [(DIVIDE, "            accumulator.div_(total)\n")], says="NaN", only=True),
    Mistake("nan_in_the_gradient_of_masked_rows", "3.2", [(SHIFT, "            shift = logsumexp[:, rows]\n")], says="not finite", only=True),
    Mistake("overflow_in_backward", "3.2", [("                torch.baddbmm(shift, q_rows, k_columns.mT, beta=-1, out=scores)\n", "                torch.bmm(q_rows, k_columns.mT, out=scores)\n"), (AGAIN, "                weights = scores.exp2_().div_(shift.exp2())\n")], says="not finite", only=True),
    Mistake("finite_fill", "3.2", [(HIDE, HIDE.replace("-math.inf", "-1e9"))], says="may attend to nothing", only=True),
    Mistake("mask_multiplies_scores", ("3.2", "3.4"), [(HIDE, "            scores.unflatten(0, self.leading).mul_(self.mask[:, :, rows, columns])\n")], says="mask"),
    Mistake("mask_after_the_maximum_and_sum", "3.2", [(TOTAL, TOTAL + "                if mask is not None:\n                    weights.unflatten(0, blocks.leading).mul_(blocks.mask[:, :, rows, columns])\n"), (FORWARD_HIDE, PRODUCT + "                masked, blocks.mask = blocks.mask, None\n                blocks.hide_(scores, rows, columns)\n                blocks.mask = masked\n")], says="mask"),
    Mistake("epsilon_in_the_sum", ("3.3", "3.4"), [(DIVIDE, "            accumulator.div_(total + 1e-8)\n")], says="differ"),
    # 3.3
    Mistake("tail_dropped", "3.3", [(SLICES, SLICES.replace("range(0, length, self.size)", "range(0, length - self.size + 1, self.size)"))], says="the last block may be smaller", only=True),
    Mistake("tail_of_the_keys_dropped", "3.3", [(COLUMNS, COLUMNS.replace("self.m if self.diagonal is None", "self.m // self.size * self.size if self.diagonal is None"))], says="the last block may be smaller", only=True),
    Mistake("tail_padded_with_zeros", "3.3", [(TOTAL, TOTAL + "                total.add_((blocks.size - (columns.stop - columns.start)) * new_maximum.neg().exp2())\n")], says="the last block may be smaller"),
    Mistake("lengths_must_be_multiples", "3.3", [(DIAGONAL, "        if self.n % self.size or self.m % self.size:\n            raise ValueError('no multiple of the block size')\n" + DIAGONAL)], says="multiple"),
    Mistake("block_larger_than_length_refused", "3.3", [(DIAGONAL, "        assert self.size <= max(self.n, self.m, 16), 'block too large'\n" + DIAGONAL)], says="block too large"),
    Mistake("n_equals_m", "3.3", [("        self.n, self.m, self.size = Q.size(2), K.size(2), size\n", "        self.n, self.m, self.size = Q.size(2), min(Q.size(2), K.size(2)), size\n")], says="N and M are unrelated"),
    Mistake("causal_aligned_at_the_start", "3.3", [(DIAGONAL, "        self.diagonal = 0 if causal else None\n")], says="j <= i + M - N", only=True),
    Mistake("one_query_squeezed", "3.3", [(RETURN, "        return (result.squeeze(2) if result.size(2) == 1 else result), natural\n")], says="shape"),
    Mistake("mask_cached_for_the_first_length", "3.3", [(DIAGONAL, "        size = _Blocks.cached = getattr(_Blocks, 'cached', self.m)\n        self.diagonal = size - self.n if causal else None\n")], says="j <= i + M - N"),
    Mistake("mask_ignored_in_a_single_block", "3.3", [(APPLY, "        if max(Q.size(2), K.size(2)) <= self.block_size:\n            mask = None\n" + APPLY)], says="N = 1, M = 3", only=True),
    Mistake("output_memory_used_again", "3.3", [(RETURN, "        if not any(ctx.needs_input_grad):\n            kept = _Blocks.kept = getattr(_Blocks, 'kept', {})\n            result = kept.setdefault((result.shape, result.dtype), result).copy_(result)\n" + RETURN)], says="when later calls have been made", only=True),
    Mistake("mask_of_the_first_call", "3.3", [(APPLY, "        if mask is not None:\n            mask = self.__dict__.setdefault('masks', {}).setdefault(tuple(mask.shape), mask)\n" + APPLY)], says="values differ"),
    # 3.4
    Mistake("no_scale", "3.4", [(SCALE, "        self.scale = 1.0\n")], says="√Dh"),
    Mistake("base_two_logsumexp", "3.4", [(NATURAL, "        natural = logsumexp.view(Q.shape[:3])\n")], says="natural logarithm"),
    Mistake("logsumexp_without_maximum", "3.4", [(NATURAL, NATURAL + "        natural = natural - (maximum / _LOG2_E).view(Q.shape[0], Q.shape[1], -1)[..., -1:].amax()\n")], says="logsumexp"),
    Mistake("mean_of_the_blocks_softmaxes", "3.4", [(WEIGHTS + RESCALE + TOTAL + ACCUMULATE, MEAN_OF_BLOCKS)], says="3/4 of 4"),
    Mistake("causal_index_local_to_the_block", "3.4", [(CROSSING, "        if self.diagonal is not None:\n"), (ABOVE, "            above = 1\n")], says="count from the first block"),
    Mistake("causal_hides_the_query_itself", "3.4", [(ABOVE, ABOVE.replace("+ 1 -", "-"))], says="query i sees key j <= i"),
    Mistake("causal_drops_the_diagonal_block", "3.4", [(COLUMNS, COLUMNS.replace("rows.stop +", "rows.start +"))], says="causal"),
    Mistake("causal_sees_one_key_too_many", "3.4", [(ABOVE, ABOVE.replace("+ 1 -", "+ 2 -"))], says="query i sees key j <= i"),
    Mistake("causal_ignored", "3.4", [(APPLY, APPLY.replace("mask, causal,", "mask, False,"))], says="query i sees key j <= i"),
    Mistake("causal_ignored_with_a_mask", "3.4", [(APPLY, APPLY.replace("mask, causal,", "mask, causal and mask is None,"))], says="causal = True"),
    Mistake("mask_ignored_with_causal", "3.4", [(APPLY, APPLY.replace("mask, causal,", "None if causal else mask, causal,"))], says="causal = True"),
    Mistake("causal_lost_in_forward", "3.4", [(ATTEND, ATTEND.replace(", causal)", ")"))], says="causal"),
    Mistake("mask_lost_in_forward", "3.4", [(ATTEND, ATTEND.replace("mask, causal", "None, causal"))], says="mask"),
    Mistake("mask_ignored", "3.4", [(HIDE, "            pass\n")], says="a mask of"),
    Mistake("mask_inverted", "3.4", [(HIDE, HIDE.replace("== 0", "!= 0"))], says="may attend"),
    Mistake("integer_mask_inverted_bitwise", "3.4", [(HIDE, HIDE.replace("self.mask[:, :, rows, columns] == 0", "(~self.mask[:, :, rows, columns]).bool()"))], says="uint8"),
    Mistake("only_bool_masks", "3.4", [(HIDE, HIDE.replace("self.mask[:, :, rows, columns] == 0", "~self.mask[:, :, rows, columns]"))], says="boolean"),
    Mistake("mask_of_the_first_row_for_all", "3.4", [(EXPANDED, EXPANDED.replace("mask.expand", "mask[:1].expand"))], says="a mask of"),
    Mistake("mask_of_the_first_head_for_all", "3.4", [(EXPANDED, EXPANDED.replace("mask.expand", "mask[:, :1].expand"))], says="a mask of shape"),
    Mistake("mask_sliced_before_it_broadcasts", "3.4", [(EXPANDED, "        self.mask = mask\n")], says="size of tensor"),
    Mistake("bad_masks_accepted", "3.4", [(CHECK, "            pass\n")], says="mask of shape", only=True),
    Mistake("only_dimensions_checked", "3.4", [(CHECKED, "        fits = mask.dim() == 4\n")], says="mask of shape", only=True),
    Mistake("mask_error_without_shapes", "3.4", [('raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to {shape}")', 'raise ValueError("bad mask")')], says="lacks", only=True),
    Mistake("extra_buffer", "3.4", [(SCALE, SCALE + '        self.register_buffer("causal_mask", torch.ones(8, 8).tril())\n')], says="causal_mask", only=True),
    Mistake("bias_in_the_projections", "3.4", [("        self.v_proj = nn.Linear(d_model, d_model, bias=False)\n", "        self.v_proj = nn.Linear(d_model, d_model, bias=True)\n        nn.init.zeros_(self.v_proj.bias)\n")], says="v_proj.bias", only=True),
    Mistake("heads_viewed_without_transpose", "3.4", [(HEADS, "        Q, K, V = (linear(x).reshape(x.size(0), self.num_heads, x.size(1), -1) for linear in projections)\n")], says="transpose"),
    Mistake("heads_not_transposed_back", "3.4", [(JOIN, "        return self.o_proj(output.reshape(x.shape))\n")], says="transpose back"),
    Mistake("no_output_projection", "3.4", [(JOIN, JOIN.replace("self.o_proj(", "(").replace("(output", "output").replace("=2))", "=2)"))], says="o_proj"),
    Mistake("values_from_the_key_projection", "3.4", [(PROJECTIONS, "        projections = (self.q_proj, self.k_proj, self.k_proj)\n")], says="forward"),
    Mistake("float64_in_float32", "3.4", [("        work = torch.promote_types(Q.dtype, torch.float32)\n", "        dtype, Q, K, V = Q.dtype, Q.float(), K.float(), V.float()\n        q, k, v = (x.flatten(0, 1) for x in (Q, K, V))\n        work = torch.float32\n")], says="dtype"),
    Mistake("buffer_left_on_the_cpu", "3.4", [(BUFFER, BUFFER.replace(", device=self.device", ""))], says="meta", only=True),
    Mistake("weights_fused_at_the_first_call", "3.4", [(HEADS, "        if not hasattr(self, 'fused'):\n            self.fused = [[linear.weight.detach().clone()] for linear in projections]\n        kept = [[w[0].to(x)] for w in self.fused]\n        Q, K, V = ((x @ w[0].mT + 0 * linear(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for w, linear in zip(kept, projections))\n")], says="changed in place"),
    Mistake("contiguous_inputs_only", "3.4", [("        q, k, v = (x.flatten(0, 1) for x in (Q, K, V))  # [BH, N, Dh], [BH, M, Dh]\n", "        q, k, v = (x.detach().as_strided((x.size(0) * x.size(1), *x.shape[2:]), (x.size(2) * x.size(3), x.size(3), 1)) for x in (Q, K, V))\n")], says="views"),
    Mistake("query_written_to", "3.4", [(FORWARD_Q_ROWS, FORWARD_Q_ROWS.replace("to(work) * (scale * _LOG2_E)", "to(work).mul_(scale * _LOG2_E)"))], says="written to"),
    Mistake("mask_written_to", "3.4", [(HIDE, HIDE + "            self.mask[:, :, rows, columns].zero_()\n")], says="mask"),
    Mistake("mask_enlarges_the_batch", "3.4", [(CHECKED, CHECKED.replace("size in (1, full)", "size in (1, full) or full == 1"))], says="forward(x of shape (1, 8, 15)) with a mask", only=True),
    Mistake("one_column_refused", "3.4", [(CHECK, CHECK + "            if mask.size(3) == 1 < x.size(1):\n                raise ValueError('a mask of one column')\n")], says="a mask of one column", only=True),
    Mistake("diagonal_left_on_the_cpu", "3.4", [("            scores.add_(scores.new_full(scores.shape[1:], -math.inf).triu_(above))\n", "            scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool).triu(above), -math.inf)\n")], says="device", only=True),
    # 3.5
    Mistake("causal_computes_every_block", "3.5", [(COLUMNS, "        return self._slices(self.m)\n")], says="1.00 of the exponentials", only=True),
    Mistake("row_by_row", "3.5", [(ROWS, "        return (slice(i, i + 1) for i in range(self.n))\n")], says="loop over its rows", only=True),
    Mistake("key_by_key", "3.5", [(COLUMNS, "        stop = self.m if self.diagonal is None else min(self.m, rows.stop + self.diagonal)\n        return (slice(j, j + 1) for j in range(stop))\n")], says="loop over its rows", only=True),
    Mistake("earlier_blocks_visited_again", "3.5", [(LOWEST, LOWEST + "            for _ in range(rows.start // blocks.size * 4):\n                for columns in blocks.columns(rows):\n                    q_rows @ k[:, columns].to(work).mT\n")], says="visit each pair of blocks once", only=True),
    # 3.6
    Mistake("probabilities_kept_on_ctx", "3.6", [(OUTPUT, OUTPUT + "        ctx.kept = []\n"), (WEIGHTS, WEIGHTS + "                if any(ctx.needs_input_grad):\n                    ctx.kept.append(weights.clone())\n")], says="stay alive for backward"),
    Mistake("autograd_through_the_loop", "3.6", [(APPLY, AUTOGRAD_THROUGH_THE_LOOP)], says="stay alive for backward"),
    Mistake("backward_all_at_once", "3.6", [(BACKWARD_BLOCKS, BACKWARD_BLOCKS.replace("block_size)", "max(Q.size(2), K.size(2)))"))], says="N·M is", only=True),
    Mistake("no_gradient", "3.6", [(APPLY, APPLY.replace("Q, K, V,", "Q.detach(), K.detach(), V.detach(),"))], says="does not", only=True),
    Mistake("no_gradient_for_keys", "3.6", [(GRADS, "        q_grad, _, v_grad = (gradient.to(x.dtype).view(x.shape) for gradient, x in given)\n        return q_grad, None, v_grad, None, None, None, None\n")], says="gradient of K"),
    Mistake("backward_without_scale", "3.6", [(GRAD_Q, GRAD_Q.replace("alpha=scale", "alpha=1")), (GRAD_K, GRAD_K.replace("1 / _LOG2_E", "1 / (scale * _LOG2_E)"))], says="2.236 times", only=True),
    Mistake("query_gradient_without_scale", "3.6", [(GRAD_Q, GRAD_Q.replace("alpha=scale", "alpha=1"))], says="gradient of Q", only=True),
    Mistake("backward_without_row_sum", "3.6", [(ROW_SUM, ROW_SUM + "            row_sum = torch.zeros_like(row_sum)\n")], says="rowsum(dO ∘ O)", only=True),
    Mistake("row_sum_of_the_output_alone", "3.6", [(ROW_SUM, "            row_sum = output[:, rows].to(work).sum(-1, keepdim=True)\n")], says="rowsum(dO ∘ O)", only=True),
    Mistake("backward_without_logsumexp", "3.6", [(SHIFT, "            shift = torch.zeros_like(logsumexp[:, rows])\n")], says="P = (3/4, 1/4)"),
    Mistake("key_gradient_of_the_last_block_of_queries", "3.6", [(GRAD_K, "                grad_k[:, columns] = grad_scores.mT @ q_rows / _LOG2_E\n")], says="gradient of K", only=True),
    Mistake("value_gradient_not_transposed", "3.6", [(GRAD_V, "                grad_v[:, columns].baddbmm_(weights if weights.size(1) == weights.size(2) else weights.mT, grad_rows)\n")], says="gradient of V"),
    Mistake("backward_ignores_causal", "3.6", [(BACKWARD_BLOCKS, BACKWARD_BLOCKS.replace("causal,", "False,"))], says="causal", only=True),
    Mistake("backward_ignores_the_mask", "3.6", [(BACKWARD_BLOCKS, BACKWARD_BLOCKS.replace("K, mask,", "K, None,"))], says="mask"),
    Mistake("backward_drops_the_tail", "3.6", [(BACKWARD_BLOCKS, BACKWARD_BLOCKS.replace("        buffer,", "        blocks._slices = lambda n: (slice(i, i + block_size) for i in range(0, n - block_size + 1, block_size))\n        buffer,"))], says="N = 6", only=True),
    Mistake("backward_of_the_last_call", "3.6", [(SAVE, "        _BlockwiseAttention.saved = Q, K, V, mask, result, logsumexp\n"), (LOAD, LOAD.replace("ctx.saved_tensors", "_BlockwiseAttention.saved"))], says="another call"),
    Mistake("backward_spoils_what_was_saved", "3.6", [(AGAIN, AGAIN + "                logsumexp[:, rows] += 1 if columns.stop == blocks.m else 0\n")], says="inplace operation", only=True),
    Mistake("output_gradient_written_to", "3.6", [(GRADS, "        grads[0].mul_(0.5)\n" + GRADS)], says="writes to it"),
    Mistake("contiguous_output_gradient_only", "3.6", [("        q, k, v, output, grad = (x.flatten(0, 1) for x in (Q, K, V, result, grads[0]))\n", "        q, k, v, output = (x.flatten(0, 1) for x in (Q, K, V, result))\n        grad = grads[0].view(q.shape)\n")], says="view", only=True),
    Mistake("no_gradient_in_eval", "3.6", [(ATTEND, "        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):\n    " + ATTEND)], says="gradient", only=True),
    Mistake("integer_mask_lost_in_backward", "3.6", [(BACKWARD_BLOCKS, "        mask = None if mask is not None and mask.dtype == torch.int32 else mask\n" + BACKWARD_BLOCKS)], says="a mask of torch.int32", only=True),
    Mistake("float32_copies_kept", "3.6", [(SAVE, SAVE + "        ctx.copies = [x.to(work, copy=True) for x in (Q, K, V, result)]\n")], says="bfloat16", only=True),
    # 3.7
    Mistake("computes_in_half_precision", "3.7", [("        work = torch.promote_types(Q.dtype, torch.float32)\n", "        work = Q.dtype\n")], says="times that of", only=True),
    Mistake("scores_in_half_precision", "3.7", [(PRODUCT, PRODUCT + "                scores.copy_(scores.to(Q.dtype))\n")], says="float32", only=True),
    Mistake("scaled_in_half_precision", "3.7", [(FORWARD_Q_ROWS, FORWARD_Q_ROWS.replace("q[:, rows].to(work) * (scale * _LOG2_E)", "(q[:, rows] * (scale * _LOG2_E)).to(work)"))], says="before scaling", only=True),
    Mistake("accumulator_in_half_precision", "3.7", [(ACCUMULATE, ACCUMULATE + "                accumulator.copy_(accumulator.to(Q.dtype))\n")], says="accumulator in float32", only=True),
    Mistake("sum_in_half_precision", "3.7", [(TOTAL, TOTAL + "                total.copy_(total.to(Q.dtype))\n")], says="float32", only=True),
    Mistake("logsumexp_in_half_precision", "3.7", [(NATURAL, NATURAL.replace(".view(Q.shape[:3])", ".view(Q.shape[:3]).to(Q.dtype)"))], says="float32 or better", only=True),
    Mistake("output_in_float32", "3.7", [(RESULT, "        result = output.view(Q.shape)\n")], says="torch.float32", only=True),
    Mistake("weights_times_values_in_half_precision", "3.7", [(ACCUMULATE, "                accumulator.mul_(rescale).add_(torch.bmm(weights.to(v.dtype), v[:, columns]))\n")], says="half", only=True),
    Mistake("backward_in_half_precision", "3.7", [("        work = logsumexp.dtype\n", "        work = Q.dtype\n        logsumexp = logsumexp.to(work)\n")], says="multiplies in half precision", only=True),
    # 3.8
    Mistake("other_weights", "3.8", [(SIDES, SIDES.replace("partial(attention, x)", "partial(FlashAttention(d_model, num_heads), x)"))], says="same weights", only=True),
    Mistake("output_projection_left_out_of_standard", "3.8", [(STANDARD_JOIN, "    return (weights @ v).transpose(1, 2).flatten(start_dim=2)\n")], says="same weights", only=True),
    Mistake("another_input", "3.8", [(SIDES, SIDES.replace("partial(attention, x)", "partial(attention, torch.randn_like(x))"))], says="same weights", only=True),
    Mistake("standard_against_itself", "3.8", [(ERROR, '        "max_abs_error": (standard() - standard()).abs().max().item(),\n')], says="rounding", only=True),
    Mistake("invented_error", "3.8", [(ERROR, '        "max_abs_error": 1e-6,\n')], says="not 1", only=True),
    Mistake("mean_error", "3.8", [(ERROR, ERROR.replace(".max()", ".mean()"))], says="largest absolute difference", only=True),
    Mistake("signed_error", "3.8", [(ERROR, '        "max_abs_error": max((flash() - standard()).max().item(), 1e-9),\n')], says="largest absolute difference", only=True),
    Mistake("error_as_a_tensor", "3.8", [(ERROR, ERROR.replace(".item()", ""))], says="not a Python number", only=True),
    Mistake("error_of_zero_inputs", "3.8", [(X, "    x = torch.zeros(1, length, d_model)\n")], says="max_abs_error", only=True),
    Mistake("invented_times", "3.8", [(STANDARD_SECONDS, '        "standard_seconds": 0.001,\n'), (FLASH_SECONDS, '        "flash_seconds": 0.001,\n')], says="not measured", only=True),
    Mistake("times_swapped", "3.8", [(STANDARD_SECONDS, '        "standard_seconds": _seconds(flash),\n'), (FLASH_SECONDS, '        "flash_seconds": _seconds(standard),\n')], says="flash_seconds is", only=True),
    Mistake("milliseconds", "3.8", [("    return min(times)\n", "    return min(times) * 1000\n")], says="in seconds", only=True),
    Mistake("no_time_measured", "3.8", [("        function()\n        times.append", "        times.append")], says="flash_seconds is", only=True),
    Mistake("peaks_swapped", "3.8", [(STANDARD_PEAK, '        "standard_peak_bytes": peak_bytes(flash),\n'), (FLASH_PEAK, '        "flash_peak_bytes": peak_bytes(standard),\n')], says="flash_peak_bytes is", only=True),
    Mistake("peak_of_the_weights", "3.8", [(FLASH_PEAK, '        "flash_peak_bytes": sum(p.numel() * 4 for p in attention.parameters()),\n')], says="flash_peak_bytes is", only=True),
    Mistake("peak_of_one_head", "3.8", [(STANDARD_PEAK, '        "standard_peak_bytes": 4 * length**2,\n')], says="standard_peak_bytes is", only=True),
    Mistake("one_block_in_the_benchmark", "3.8", [(MODULE, "    attention = FlashAttention(d_model, num_heads, length)\n")], says="flash_peak_bytes is", only=True),
    Mistake("gradients_recorded", "3.8", [("@torch.no_grad()\ndef _compare", "def _compare")], says="gradients are recorded", only=True),
    Mistake("batch_of_two", "3.8", [(X, "    x = torch.randn(2, length, d_model)\n")], says="flash_peak_bytes", only=True),
    Mistake("rows_sorted", "3.8", [(ROW_PER_LENGTH, ROW_PER_LENGTH.replace("seq_lengths]", "sorted(seq_lengths)]"))], says="rows for", only=True),
    Mistake("sizes_ignored", "3.8", [(ROW_PER_LENGTH, ROW_PER_LENGTH.replace("d_model, num_heads)", "512, 8)"))], says="peak_bytes is"),
    Mistake("other_default_sizes", "3.8", [(ROW_PER_LENGTH, "    d_model = 256 if d_model == 512 else d_model\n" + ROW_PER_LENGTH)], says="[1, N, 512]", only=True),
    Mistake("standard_seconds_of_flash", "3.8", [(STANDARD_SECONDS, '        "standard_seconds": _seconds(flash),\n')], says="standard_seconds is", only=True),
    Mistake("seconds_of_all_repeats", "3.8", [("repeats: int = 3", "repeats: int = 20"), ("    return min(times)\n", "    return sum(times)\n")], says="of one call", only=True),
    Mistake("standard_peak_by_formula", "3.8", [(STANDARD_PEAK, '        "standard_peak_bytes": 3 * 4 * num_heads * length**2,\n')], says="never said", only=True),
    Mistake("four_heads_by_default", "3.8", [(ROW_PER_LENGTH, "    num_heads = 4 if num_heads == 8 else num_heads\n" + ROW_PER_LENGTH)], says="8 was wanted", only=True),
    # 3.9
    Mistake("scaled_dot_product_attention", "3.9", [(APPLY, PREBUILT)], says="scaled_dot_product_attention"),
    Mistake("scaled_dot_product_attention_in_the_benchmark", "3.9", [(STANDARD_WEIGHTS, ""), (STANDARD_JOIN, "    output = nn.functional.scaled_dot_product_attention(q, k, v)\n    return attention.o_proj(output.transpose(1, 2).flatten(start_dim=2))\n")], says="benchmark_attention reached"),
    Mistake("prebuilt_in_backward", "3.9", [(GRADS, "        if mask is None and not causal:\n            nn.functional.scaled_dot_product_attention(Q[:, :, :1], K[:, :, :1], V[:, :, :1])\n" + GRADS)], says="backward reached", only=True),
    Mistake("prebuilt_where_causal", "3.9", [(APPLY, "        if causal and mask is None:\n            nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True)\n" + APPLY)], says="reached", only=True),
    # 3.10
    Mistake("unused_import", "3.10", [("import math\n", "import json\nimport math\n")], says="F401", only=True),
    Mistake("no_docstring", "3.10", [("@torch.no_grad()\ndef _compare", "def helper() -> int:\n    return 1\n\n\n@torch.no_grad()\ndef _compare")], says="D103", only=True),
    Mistake("no_annotations", "3.10", [("def _compare(length: int, d_model: int, num_heads: int) -> dict[str, float]:", "def _compare(length, d_model, num_heads):")], says="annotation", only=True),
    Mistake("wrong_annotation", "3.10", [("def _seconds(function: Callable[[], Any], repeats: int = 3) -> float:", "def _seconds(function: Callable[[], Any], repeats: int = 3) -> Tensor:")], says="Tensor", only=True),
]  # fmt: skip
