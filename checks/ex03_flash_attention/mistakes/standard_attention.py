"""Results that are not those of standard attention (3.4): scores, causal, masks, heads and weights, inputs."""

from harness.model.bank import Mistake

APPLY = "        return _BlockwiseAttention.apply(Q, K, V, mask, causal, self.scale, self.block_size)\n"
NATURAL = "        natural = (logsumexp / _LOG2_E).view(Q.shape[:3])\n"
ABOVE = "            above = rows.start + self.diagonal + 1 - columns.start\n"
HIDE = "            scores.unflatten(0, self.leading).masked_fill_(self.mask[:, :, rows, columns] == 0, -math.inf)\n"
CHECK = "            self._check_mask(mask, (x.size(0), self.num_heads, x.size(1), x.size(1)))\n"
ATTEND = "        output, _ = self.flash_attention_forward(Q, K, V, mask, causal)  # [B, H, N, Dh]\n"
JOIN = "        return self.o_proj(output.transpose(1, 2).flatten(start_dim=2))  # [B, N, D]\n"
SCALE = "        self.scale = (d_model // num_heads) ** -0.5\n"

MISTAKES = [
    # Scores and logsumexp
    Mistake("no_scale", "3.4", "√Dh", (SCALE, "        self.scale = 1.0\n")),
    Mistake(
        "base_two_logsumexp", "3.4", "natural logarithm", (NATURAL, "        natural = logsumexp.view(Q.shape[:3])\n")
    ),
    Mistake(
        "logsumexp_without_maximum",
        "3.4",
        "logsumexp",
        (
            NATURAL,
            NATURAL
            + "        natural = natural - (maximum / _LOG2_E).view(Q.shape[0], Q.shape[1], -1)[..., -1:].amax()\n",
        ),
    ),
    Mistake(
        "mean_of_the_blocks_softmaxes",
        "3.4",
        "3/4 of 4",
        (
            """\
                weights = scores.sub_(new_maximum).exp2_()
                rescale = maximum.sub_(new_maximum).exp2_()
                total.mul_(rescale).add_(weights.sum(-1, keepdim=True))
                accumulator.mul_(rescale).baddbmm_(weights, v[:, columns].to(work))
""",
            """\
                weights = scores.softmax(-1)
                total.add_(1)
                accumulator.baddbmm_(weights, v[:, columns].to(work))
""",
        ),
    ),
    # Causal
    Mistake(
        "causal_index_local_to_the_block",
        "3.4",
        "count from the first block",
        (
            "if self.diagonal is not None and columns.stop > rows.start + self.diagonal + 1:",
            "if self.diagonal is not None:",
        ),
        (ABOVE, "            above = 1\n"),
    ),
    Mistake("causal_hides_the_query_itself", "3.4", "query i sees key j <= i", (ABOVE, ABOVE.replace("+ 1 -", "-"))),
    Mistake("causal_drops_the_diagonal_block", "3.4", "causal", ("rows.stop +", "rows.start +")),
    Mistake("causal_sees_one_key_too_many", "3.4", "query i sees key j <= i", (ABOVE, ABOVE.replace("+ 1 -", "+ 2 -"))),
    Mistake(
        "causal_ignored", "3.4", "query i sees key j <= i", (APPLY, APPLY.replace("mask, causal,", "mask, False,"))
    ),
    Mistake(
        "causal_ignored_with_a_mask",
        "3.4",
        "causal = True",
        (APPLY, APPLY.replace("mask, causal,", "mask, causal and mask is None,")),
    ),
    Mistake(
        "mask_ignored_with_causal",
        "3.4",
        "causal = True",
        (APPLY, APPLY.replace("mask, causal,", "None if causal else mask, causal,")),
    ),
    Mistake("causal_lost_in_forward", "3.4", "causal", (ATTEND, ATTEND.replace(", causal)", ")"))),
    # Masks
    Mistake("mask_lost_in_forward", "3.4", "mask", (ATTEND, ATTEND.replace("mask, causal", "None, causal"))),
    Mistake("mask_ignored", "3.4", "a mask of", (HIDE, "            pass\n")),
    Mistake("mask_inverted", "3.4", "may attend", (HIDE, HIDE.replace("== 0", "!= 0"))),
    Mistake(
        "integer_mask_inverted_bitwise",
        "3.4",
        "uint8",
        ("self.mask[:, :, rows, columns] == 0", "(~self.mask[:, :, rows, columns]).bool()"),
    ),
    Mistake(
        "only_bool_masks", "3.4", "boolean", ("self.mask[:, :, rows, columns] == 0", "~self.mask[:, :, rows, columns]")
    ),
    Mistake("mask_of_the_first_row_for_all", "3.4", "a mask of", ("mask.expand", "mask[:1].expand")),
    Mistake("mask_of_the_first_head_for_all", "3.4", "a mask of shape", ("mask.expand", "mask[:, :1].expand")),
    Mistake(
        "mask_sliced_before_it_broadcasts",
        "3.4",
        "size of tensor",
        (
            "self.mask = None if mask is None else mask.expand(*self.leading, self.n, self.m)",
            "self.mask = mask",
        ),
    ),
    Mistake("bad_masks_accepted", "3.4", "mask of shape", (CHECK, "            pass\n"), only=True),
    Mistake(
        "only_dimensions_checked",
        "3.4",
        "mask of shape",
        (
            "fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, shape, strict=True))",
            "fits = mask.dim() == 4",
        ),
        only=True,
    ),
    Mistake(
        "mask_error_without_shapes",
        "3.4",
        "lacks",
        (
            'raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to {shape}")',
            'raise ValueError("bad mask")',
        ),
        only=True,
    ),
    # Weights and heads
    Mistake(
        "extra_buffer",
        "3.4",
        "causal_mask",
        (SCALE, SCALE + '        self.register_buffer("causal_mask", torch.ones(8, 8).tril())\n'),
        only=True,
    ),
    Mistake(
        "bias_in_the_projections",
        "3.4",
        "v_proj.bias",
        (
            "        self.v_proj = nn.Linear(d_model, d_model, bias=False)\n",
            """\
        self.v_proj = nn.Linear(d_model, d_model, bias=True)
        nn.init.zeros_(self.v_proj.bias)
""",
        ),
        only=True,
    ),
    Mistake(
        "heads_viewed_without_transpose",
        "3.4",
        "without the transpose after the split",
        (
            "unflatten(-1, (self.num_heads, -1)).transpose(1, 2)",
            "reshape(x.size(0), self.num_heads, x.size(1), -1)",
        ),
    ),
    Mistake(
        "heads_not_transposed_back",
        "3.4",
        "without the transpose before the join",
        (JOIN, "        return self.o_proj(output.reshape(x.shape))\n"),
    ),
    Mistake(
        "no_output_projection",
        "3.4",
        "without o_proj",
        (JOIN, JOIN.replace("self.o_proj(", "(").replace("(output", "output").replace("=2))", "=2)")),
    ),
    Mistake(
        "values_from_the_key_projection",
        "3.4",
        "forward",
        (
            "projections = (self.q_proj, self.k_proj, self.v_proj)",
            "projections = (self.q_proj, self.k_proj, self.k_proj)",
        ),
    ),
    # Dtype, device, new weights, strides, writes; masks again
    Mistake(
        "float64_in_float32",
        "3.4",
        "dtype",
        (
            "        work = torch.promote_types(Q.dtype, torch.float32)\n",
            """\
        dtype, Q, K, V = Q.dtype, Q.float(), K.float(), V.float()
        q, k, v = (x.flatten(0, 1) for x in (Q, K, V))
        work = torch.float32
""",
        ),
    ),
    Mistake("buffer_left_on_the_cpu", "3.4", "meta", (", device=self.device", ""), only=True),
    Mistake(
        "weights_fused_at_the_first_call",
        "3.4",
        "changed in place",
        (
            "        Q, K, V = (linear(x).",
            """\
        if not hasattr(self, 'fused'):
            self.fused = [[linear.weight.detach().clone()] for linear in projections]
        kept = [[w[0].to(x)] for w in self.fused]
        Q, K, V = ((x @ w[0].mT + 0 * linear(x)).""",
        ),
        ("for linear in projections)\n" + ATTEND, "for w, linear in zip(kept, projections))\n" + ATTEND),
    ),
    Mistake(
        "contiguous_inputs_only",
        "3.4",
        "transpose",
        (
            "x.flatten(0, 1) for x in (Q, K, V))  # [BH, N, Dh], [BH, M, Dh]",
            "x.detach().as_strided((x.size(0) * x.size(1), *x.shape[2:]), (x.size(2) * x.size(3), x.size(3), 1)) "
            "for x in (Q, K, V))",
        ),
    ),
    Mistake(
        "query_written_to",
        "3.4",
        "written to",
        (
            "q[:, rows].to(work) * (scale * _LOG2_E)  # [BH, n, Dh]\n            accumulator",
            "q[:, rows].to(work).mul_(scale * _LOG2_E)  # [BH, n, Dh]\n            accumulator",
        ),
    ),
    Mistake("mask_written_to", "3.4", "mask", (HIDE, HIDE + "            self.mask[:, :, rows, columns].zero_()\n")),
    Mistake(
        "mask_enlarges_the_batch",
        "3.4",
        "forward(x of shape (1, 8, 15)) with a mask",
        ("size in (1, full)", "size in (1, full) or full == 1"),
        only=True,
    ),
    Mistake(
        "one_column_refused",
        "3.4",
        "a mask of one column",
        (
            CHECK,
            CHECK
            + """\
            if mask.size(3) == 1 < x.size(1):
                raise ValueError('a mask of one column')
""",
        ),
        only=True,
    ),
    Mistake(
        "diagonal_left_on_the_cpu",
        "3.4",
        "device",
        (
            "scores.add_(scores.new_full(scores.shape[1:], -math.inf).triu_(above))",
            "scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool).triu(above), -math.inf)",
        ),
        only=True,
    ),
    Mistake(
        "a_mask_that_hid_nothing_until_its_version_changes",
        "3.4",
        "changed through .data",
        (
            APPLY,
            """\
        if mask is not None and not mask.is_inference():
            seen, version = getattr(self, "_open", (None, 0))
            if seen is mask and version == mask._version:
                mask = None
            elif mask.all():
                self._open = mask, mask._version
"""
            + APPLY,
        ),
        only=True,
    ),
]
