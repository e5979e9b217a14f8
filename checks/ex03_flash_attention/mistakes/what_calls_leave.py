"""What earlier calls, other sizes, roles and layouts change: state that stays, special cases that go another way."""

from harness.model.bank import Mistake

APPLY = "        return _BlockwiseAttention.apply(Q, K, V, mask, causal, self.scale, self.block_size)\n"
WORK = "        work = torch.promote_types(Q.dtype, torch.float32)\n"
CHECK = "            self._check_mask(mask, (x.size(0), self.num_heads, x.size(1), x.size(1)))\n"
HEADS = "        Q, K, V = (linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in projections)\n"
HIDE = "            scores.unflatten(0, self.leading).masked_fill_(self.mask[:, :, rows, columns] == 0, -math.inf)\n"
PRODUCT = "                torch.bmm(q_rows, k[:, columns].to(work).mT, out=scores)\n"
MAXIMUM = "                new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))\n"
WEIGHTS = "                weights = scores.sub_(new_maximum).exp2_()\n"
AGAIN = "                weights = scores.exp2_()\n"
FLAT = "        q, k, v = (x.flatten(0, 1) for x in (Q, K, V))  # [BH, N, Dh], [BH, M, Dh]\n"
SAVE = "        ctx.save_for_backward(Q, K, V, mask, result, logsumexp)\n"
GRADS = "        return *(gradient.to(x.dtype).view(x.shape) for gradient, x in given), None, None, None, None\n"
ZEROS = "        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=work) for x in (q, k, v))\n"
PREBUILT = "nn.functional.scaled_dot_product_attention(Q, K, V)"
STACKED = """\
        if {condition}:
            if not hasattr(self, "stacked"):
                self.stacked = (torch.cat([linear.weight.detach().clone() for linear in projections]),)
            parts = nn.functional.linear(x, self.stacked[0].to(x.dtype)).chunk(3, -1)
            Q, K, V = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
"""

MISTAKES = [
    # State of an earlier call
    Mistake(
        "row_sum_of_the_first_backward",
        "3.6",
        "second backward",
        (
            "            row_sum = (grad_rows * output[:, rows]).sum(-1, keepdim=True)  # [BH, n, 1]\n",
            """\
            row_sum = (grad_rows * output[:, rows]).sum(-1, keepdim=True)
            row_sum = ctx.__dict__.setdefault("row_sums", {}).setdefault(rows.start, row_sum)
""",
        ),
        only=True,
    ),
    Mistake(
        "the_first_o_proj_for_good",
        "3.4",
        "a new v_proj or o_proj",
        (
            "        self.o_proj = nn.Linear(d_model, d_model)\n",
            "        self.o_proj = nn.Linear(d_model, d_model)\n        self.last = (self.o_proj,)\n",
        ),
        ("return self.o_proj(", "return self.last[0]("),
        only=True,
    ),
    Mistake(
        "weights_stacked_at_the_first_inference",
        "3.4",
        "weights",
        (HEADS, HEADS + STACKED.format(condition="not torch.is_grad_enabled()")),
        only=True,
    ),
    Mistake(
        "weights_stacked_in_eval",
        "3.4",
        "in eval",
        (HEADS, HEADS + STACKED.format(condition="not self.training and not torch.is_grad_enabled()")),
        only=True,
    ),
    Mistake(
        "weights_stacked_until_their_version_changes",
        "3.4",
        ".data",
        (
            HEADS,
            HEADS
            + """\
        version = [linear.weight._version for linear in projections], x.dtype
        if getattr(self, "version", None) != version:
            self.__dict__.pop("stacked", None)
            self.version = version
"""
            + STACKED.format(condition="not torch.is_grad_enabled()"),
        ),
        only=True,
    ),
    Mistake(
        "weights_stacked_until_their_version_or_place_changes",
        "3.4",
        "through .data",
        (
            HEADS,
            HEADS
            + """\
        version = [(linear.weight._version, linear.weight.data_ptr()) for linear in projections], x.dtype
        if getattr(self, "version", None) != version:
            self.__dict__.pop("stacked", None)
            self.version = version
"""
            + STACKED.format(condition="not self.training and not torch.is_grad_enabled()"),
        ),
        only=True,
    ),
    Mistake(
        "mask_remembered_by_identity",
        "3.4",
        "the same mask",
        (
            APPLY,
            """\
        if mask is not None:
            if getattr(self, "_seen", None) is not mask:
                self._seen, self._as_bool = mask, mask != 0
            mask = self._as_bool
"""
            + APPLY,
        ),
    ),
    Mistake(
        "good_shapes_remembered",
        "3.4",
        "does not fit",
        (
            CHECK,
            """\
            good = self.__dict__.setdefault("good", set())
            if tuple(mask.shape) not in good:
                self._check_mask(mask, (x.size(0), self.num_heads, x.size(1), x.size(1)))
                good.add(tuple(mask.shape))
            mask = mask.expand(-1, -1, -1, mask.size(3)) if mask.size(3) in (1, x.size(1)) else mask[..., :1]
""",
        ),
        only=True,
    ),
    Mistake(
        "scale_of_the_first_module",
        "3.4",
        "values differ",
        (
            APPLY,
            "        kept = _Blocks.__dict__.get('scale') or setattr(_Blocks, 'scale', self.scale)\n"
            + APPLY.replace("self.scale", "kept or self.scale"),
        ),
    ),
    Mistake(
        "dtype_of_the_first_call",
        "3.7",
        "nine digits",
        (
            APPLY,
            """\
        work = self.__dict__.setdefault("work", torch.promote_types(Q.dtype, torch.float32))
        output, logsumexp = _BlockwiseAttention.apply(
            Q.to(work), K.to(work), V.to(work), mask, causal, self.scale, self.block_size
        )
        return output.to(Q.dtype), logsumexp
""",
        ),
    ),
    Mistake(
        "constant_of_the_first_inference",
        "3.4",
        "inference_mode",
        (
            APPLY,
            """\
        self.one = getattr(self, "one", (torch.ones(1, dtype=Q.dtype),))
        Q = Q * self.one[0].to(Q.dtype)
"""
            + APPLY,
        ),
    ),
    Mistake(
        "causal_of_the_last_call",
        "3.6",
        "another call before backward",
        (SAVE, "        _Blocks.causal = causal\n" + SAVE),
        (
            "        causal, scale, block_size = ctx.options\n",
            "        _, scale, block_size = ctx.options\n        causal = _Blocks.causal\n",
        ),
        only=True,
    ),
    # Far from zero, together with masks
    Mistake(
        "maximum_zero_in_hidden_blocks",
        "3.2",
        "no part in the maximum",
        (MAXIMUM, MAXIMUM.replace("keepdim=True))", "keepdim=True).nan_to_num(neginf=0.0))")),
        only=True,
    ),
    Mistake(
        "maximum_of_hidden_scores",
        "3.2",
        "scores",
        (PRODUCT, PRODUCT + "                highest = scores.amax(-1, keepdim=True)\n"),
        (MAXIMUM, "                new_maximum = torch.maximum(maximum, highest)\n"),
        only=True,
    ),
    Mistake(
        "maximum_of_hidden_scores_with_a_mask_per_query",
        "3.2",
        "masked",
        (PRODUCT, PRODUCT + "                highest = scores.amax(-1, keepdim=True)\n"),
        (
            MAXIMUM,
            MAXIMUM
            + """\
                if mask is not None and mask.size(2) > 1:
                    new_maximum = torch.maximum(maximum, highest)
""",
        ),
        only=True,
    ),
    Mistake(
        "hidden_scores_of_minus_500",
        "3.2",
        "scores",
        (HIDE, HIDE.replace("-math.inf", "-500.0")),
        (
            WEIGHTS,
            WEIGHTS
            + """\
                if mask is not None:
                    weights.unflatten(0, blocks.leading).mul_(blocks.mask[:, :, rows, columns] != 0)
""",
        ),
        (
            AGAIN,
            AGAIN
            + """\
                if mask is not None:
                    weights.unflatten(0, blocks.leading).mul_(blocks.mask[:, :, rows, columns] != 0)
""",
        ),
        ("maximum + total.log2()", "torch.where(total == 0, -math.inf, maximum + total.log2())"),
        only=True,
    ),
    Mistake(
        "hidden_scores_of_minus_10000",
        "3.2",
        "what a mask hides is -inf",
        (
            HIDE,
            """\
            hidden = self.mask[:, :, rows, columns] == 0
            blocks = scores.unflatten(0, self.leading).masked_fill_(hidden, -1e4)
            blocks.masked_fill_(hidden.all(-1, keepdim=True), -math.inf)
""",
        ),
        only=True,
    ),
    Mistake(
        "hidden_weights_overflow_in_backward",
        "3.2",
        "hide the scores before the exponential",
        (
            AGAIN,
            """\
                torch.baddbmm(shift, q_rows, k_columns.mT, beta=-1, out=scores)
                weights = scores.exp2_()
                if blocks.mask is not None:
                    weights.unflatten(0, blocks.leading).mul_(blocks.mask[:, :, rows, columns] != 0)
                if causal:
                    weights.mul_(torch.ones_like(weights[0]).tril_(rows.start + blocks.diagonal - columns.start))
""",
        ),
    ),
    Mistake(
        "weights_zeroed_after_the_exponential_where_the_mask_is_float",
        "3.2",
        "hide the scores before the exponential",
        (
            AGAIN,
            """\
                if mask is not None and mask.is_floating_point():
                    torch.baddbmm(shift, q_rows, k_columns.mT, beta=-1, out=scores)
                    blocks.mask = None
                    blocks.hide_(scores, rows, columns)
                    blocks.mask = mask.expand(*blocks.leading, blocks.n, blocks.m)
                    scores.exp2_().unflatten(0, blocks.leading).mul_(blocks.mask[:, :, rows, columns] != 0)
                    weights = scores
                else:
                    weights = scores.exp2_()
""",
        ),
        only=True,
    ),
    # Special sizes
    Mistake(
        "prebuilt_for_one_query",
        "3.9",
        "scaled_dot_product",
        (APPLY, f"        if Q.size(2) == 1:\n            {PREBUILT}\n" + APPLY),
        only=True,
    ),
    Mistake(
        "prebuilt_for_one_key",
        "3.9",
        "scaled_dot_product",
        (APPLY, f"        if K.size(2) == 1:\n            {PREBUILT}\n" + APPLY),
        only=True,
    ),
    Mistake(
        "prebuilt_in_eval",
        "3.9",
        "scaled_dot_product",
        (APPLY, f"        if not self.training:\n            {PREBUILT}\n" + APPLY),
        only=True,
    ),
    Mistake(
        "prebuilt_for_long_inputs",
        "3.9",
        "scaled_dot_product",
        (APPLY, f"        if K.size(2) > 4 * self.block_size:\n            {PREBUILT}\n" + APPLY),
        only=True,
    ),
    Mistake(
        "prebuilt_in_half_precision_training",
        "3.9",
        "scaled_dot_product",
        (APPLY, f"        if Q.requires_grad and Q.dtype != torch.float64:\n            {PREBUILT}\n" + APPLY),
        only=True,
    ),
    Mistake(
        "one_key_needs_no_scores",
        "3.6",
        "gradient",
        (
            APPLY,
            """\
        if K.size(2) == 1 and mask is None and not causal:
            return V.expand(-1, -1, Q.size(2), -1) * 1, ((Q * K).sum(-1) * self.scale).detach()
"""
            + APPLY,
        ),
    ),
    Mistake(
        "one_position_sees_itself",
        "3.2",
        "one query, one key",
        (
            APPLY,
            """\
        if Q.size(2) == K.size(2) == 1:
            mask = None
"""
            + APPLY,
        ),
    ),
    Mistake(
        "allowed_keys_counted_in_uint8",
        "3.4",
        "256",
        (
            SAVE,
            """\
        if mask is not None:
            result = result * (blocks.mask.sum(-1, keepdim=True, dtype=mask.dtype) != 0)
"""
            + SAVE,
        ),
        only=True,
    ),
    Mistake(
        "one_key_is_never_in_the_future",
        "3.2",
        "M = 1",
        (APPLY, "        causal = causal and K.size(2) > 1\n" + APPLY),
        only=True,
    ),
    Mistake(
        "causal_with_one_query_sees_the_first_key",
        "3.3",
        "N = 1",
        (
            "        self.diagonal = self.m - self.n if causal else None\n",
            "        self.diagonal = (self.m - self.n if self.n > 1 else 0) if causal else None\n",
        ),
        only=True,
    ),
    # Roles and layouts
    Mistake(
        "heads_viewed_in_place",
        "3.4",
        "transposed views",
        (FLAT, "        q, k, v = (x.view(-1, *x.shape[2:]) for x in (Q, K, V))\n"),
        (
            "        output, _ = self.flash_attention_forward(Q, K, V, mask, causal)  # [B, H, N, Dh]\n",
            "        Q, K, V = Q.contiguous(), K.contiguous(), V.contiguous()\n"
            "        output, _ = self.flash_attention_forward(Q, K, V, mask, causal)  # [B, H, N, Dh]\n",
        ),
    ),
    Mistake(
        "gradients_by_storage",
        "3.6",
        "one tensor",
        (
            ZEROS,
            """\
        sums = {x.data_ptr(): torch.zeros_like(x, dtype=work) for x in (q, k, v)}
        grad_q, grad_k, grad_v = (sums[x.data_ptr()] for x in (q, k, v))
""",
        ),
    ),
    Mistake(
        "gradients_summed_on_ctx",
        "3.6",
        "a second backward",
        (
            ZEROS,
            """\
        if not hasattr(ctx, "sums"):
            ctx.sums = [torch.zeros_like(x, dtype=work) for x in (q, k, v)]
        grad_q, grad_k, grad_v = ctx.sums
""",
        ),
        (GRADS, GRADS.replace("gradient.to(x.dtype).view(x.shape)", "gradient.to(x.dtype).view(x.shape) * 1")),
        only=True,
    ),
    Mistake(
        "mask_inverted_in_place_and_back",
        "3.4",
        "writes to mask",
        (
            APPLY,
            """\
        if mask is not None and mask.dtype == torch.bool and 0 not in mask.stride():
            mask.logical_not_().logical_not_()
"""
            + APPLY,
        ),
        only=True,
    ),
    Mistake(
        "diagonal_written_into_the_mask",
        "3.4",
        "mask after flash_attention_forward",
        (
            APPLY,
            """\
        if causal and mask is not None and mask.dtype == torch.bool and not torch.is_grad_enabled():
            if mask.is_contiguous() and mask.shape[2:] == (Q.size(2), K.size(2)) and K.size(2) <= self.block_size:
                mask, causal = mask.tril_(K.size(2) - Q.size(2)), False
"""
            + APPLY,
        ),
        only=True,
    ),
    Mistake(
        "query_scaled_in_place_and_back",
        "3.4",
        "writes to Q",
        (
            FLAT,
            """\
        if Q.is_contiguous():
            Q.neg_().neg_()
"""
            + FLAT,
        ),
    ),
    # Precision
    Mistake(
        "softmax_in_float32",
        "3.7",
        "below the inputs' dtype",
        (WEIGHTS, "                weights = scores.sub_(new_maximum).float().exp2_().to(work)\n"),
        only=True,
    ),
    Mistake(
        "float64_computed_in_the_dtype_of_the_mask",
        "3.7",
        "the mask's dtype decides nothing",
        (
            WORK,
            "        low = mask is not None and mask.dtype == torch.float32 or Q.dtype != torch.float64\n"
            + WORK.replace("torch.promote_types(Q.dtype, torch.float32)", "torch.float32 if low else torch.float64"),
        ),
        ("row_sum = (grad_rows * output[:, rows])", "row_sum = (grad_rows * output[:, rows].to(work))"),
        only=True,
    ),
    Mistake(
        "float64_computed_in_float32",
        "3.7",
        "float64",
        (WORK, "        work = torch.float32\n"),
        ("row_sum = (grad_rows * output[:, rows])", "row_sum = (grad_rows * output[:, rows].to(work))"),
        only=True,
    ),
]
