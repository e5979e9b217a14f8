"""Too much memory (3.1) and too much work (3.5)."""

from harness.model.bank import Mistake

APPLY = "        return _BlockwiseAttention.apply(Q, K, V, mask, causal, self.scale, self.block_size)\n"
OUTPUT = "        output = torch.zeros_like(q, dtype=work)  # [BH, N, Dh]\n"
LOWEST = "            maximum = torch.full_like(total, torch.finfo(work).min)\n"
TOTAL = "                total.mul_(rescale).add_(weights.sum(-1, keepdim=True))\n"
DIVIDE = "            accumulator.div_(total.masked_fill(total == 0, 1))\n"
LOGSUMEXP = "            logsumexp[:, rows] = maximum + total.log2()\n"
WEIGHTS = "                weights = scores.sub_(new_maximum).exp2_()\n"
DIAGONAL = "        self.diagonal = self.m - self.n if causal else None\n"
EXPANDED = "        self.mask = None if mask is None else mask.expand(*self.leading, self.n, self.m)\n"
ROWS = "        return self._slices(self.n)\n"
COLUMNS = "        return self._slices(self.m if self.diagonal is None else min(self.m, rows.stop + self.diagonal))\n"
BUFFER = "        return torch.empty(self.leading.numel() * n * m, dtype=dtype, device=self.device)\n"

MISTAKES = [
    # 3.1: memory
    Mistake(
        "standard_attention",
        "3.1",
        "does not depend on N or M",
        (
            "        return _BlockwiseAttention.apply(Q, K, V, mask, causal, self.scale, self.block_size)\n",
            """\
        scores = (Q @ K.mT * self.scale).to(torch.promote_types(Q.dtype, torch.float32))
        allowed = torch.ones(Q.size(2), K.size(2), dtype=torch.bool, device=Q.device)
        if causal:
            allowed = allowed.tril(K.size(2) - Q.size(2))
        if mask is not None:
            allowed = allowed & (mask != 0)
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1) * allowed
        logsumexp = scores.masked_fill(~allowed, -math.inf).logsumexp(-1)
        return (weights @ V.to(weights.dtype)).to(Q.dtype), logsumexp.detach()
""",
        ),
    ),
    Mistake(
        "mask_expanded_in_memory",
        "3.1",
        "an expanded view costs nothing",
        (EXPANDED, EXPANDED.replace("self.m)\n", "self.m).contiguous()\n")),
    ),
    Mistake(
        "mask_as_full_bias",
        "3.1",
        "an expanded view costs nothing",
        (EXPANDED, EXPANDED.replace("self.m)\n", "self.m) != 0\n")),
    ),
    Mistake(
        "causal_mask_of_all_pairs",
        "3.1",
        "causal",
        (
            DIAGONAL,
            DIAGONAL
            + """\
        if causal:
            tril = torch.ones(self.n, self.m, device=Q.device).tril(self.m - self.n)
            mask = tril if mask is None else mask * tril
""",
        ),
    ),
    Mistake(
        "query_blocks_times_all_keys",
        "3.1",
        "does not depend on N or M",
        (
            COLUMNS,
            """\
        stop = self.m if self.diagonal is None else min(self.m, rows.stop + self.diagonal)
        return iter([slice(0, stop)] if stop > 0 else [])
""",
        ),
        (BUFFER, BUFFER.replace("n * m", "n * self.m")),
        wasteful=True,
    ),
    Mistake(
        "all_queries_times_key_blocks",
        "3.1",
        "at most 8192",
        (ROWS, "        return iter([slice(0, self.n)])\n"),
        (BUFFER, BUFFER.replace("n * m", "self.n * m")),
    ),
    Mistake("block_size_ignored", "3.1", "block_size = 1", (DIAGONAL, "        self.size = 128\n" + DIAGONAL)),
    Mistake(
        "weights_kept_at_inference",
        "3.1",
        "2.2 times",
        (OUTPUT, OUTPUT + "        kept = []\n"),
        (WEIGHTS, WEIGHTS + "                kept.append(weights.clone())\n"),
    ),
    Mistake(
        "mask_converted_whole",
        "3.1",
        "made of the mask",
        ("mask.expand", "mask.bool().expand"),
        wasteful=True,
    ),
    # 3.5: work
    Mistake(
        "causal_computes_every_block",
        "3.5",
        "1.00 of the exponentials",
        (COLUMNS, "        return self._slices(self.m)\n"),
        wasteful=True,
    ),
    Mistake(
        "row_by_row",
        "3.5",
        "loop over its rows",
        (ROWS, "        return (slice(i, i + 1) for i in range(self.n))\n"),
        wasteful=True,
    ),
    Mistake(
        "key_by_key",
        "3.5",
        "loop over its rows",
        (
            COLUMNS,
            """\
        stop = self.m if self.diagonal is None else min(self.m, rows.stop + self.diagonal)
        return (slice(j, j + 1) for j in range(stop))
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "earlier_blocks_visited_again",
        "3.5",
        "visit each pair of blocks once",
        (
            LOWEST,
            LOWEST
            + """\
            for _ in range(rows.start // blocks.size * 4):
                for columns in blocks.columns(rows):
                    q_rows @ k[:, columns].to(work).mT
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "key_blocks_that_grow_with_the_length",
        "3.1",
        "many_keys, N = 32",
        (
            COLUMNS,
            """\
        stop = self.m if self.diagonal is None else min(self.m, rows.stop + self.diagonal)
        size = max(self.size, self.m // 4)
        return (slice(start, min(start + size, stop)) for start in range(0, stop, size))
""",
        ),
        (BUFFER, BUFFER.replace("n * m", "n * max(m, self.m // 4)")),
        wasteful=True,
    ),
    Mistake(
        "integer_mask_converted_whole",
        "3.1",
        "of torch.int32: cut and convert a mask block by block",
        (
            EXPANDED,
            "        mask = mask.bool() if mask is not None and mask.dtype == torch.int32 else mask\n" + EXPANDED,
        ),
        wasteful=True,
    ),
    Mistake(
        "blocks_above_the_diagonal_computed_with_a_mask",
        "3.5",
        "with a mask",
        (COLUMNS, COLUMNS.replace("self.diagonal is None", "self.diagonal is None or self.mask is not None")),
        wasteful=True,
    ),
    Mistake(
        "earlier_keys_visited_again",
        "3.5",
        "visit each pair of blocks once",
        (
            WEIGHTS,
            WEIGHTS
            + """\
                for start in range(0, columns.start, blocks.size) if columns.start > blocks.size else ():
                    for _ in range(4):
                        q_rows @ k[:, start : start + blocks.size].to(work).mT
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "blocks_of_4_at_least",
        "3.1",
        "one_by_one",
        (APPLY, APPLY.replace("self.block_size", "max(self.block_size, 4)")),
        wasteful=True,
    ),
    Mistake(
        "positions_kept_beside_the_module",
        "3.1",
        "stay behind",
        (
            DIAGONAL,
            DIAGONAL
            + """\
        if causal and self.m != self.n:
            kept = _Blocks.__dict__.get("kept")
            if kept is None or kept.numel() < self.m:
                _Blocks.kept = torch.arange(self.m, device=Q.device)
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "left_over_rows_one_by_one",
        "3.5",
        "left over",
        (
            ROWS,
            """\
        whole = self.n // self.size * self.size if self.n > self.size else self.n
        tail = (slice(start, start + 1) for start in range(whole, self.n))
        return iter([*self._slices(whole), *tail])
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "factors_of_every_pair_kept",
        "3.1",
        "small tensors count together",
        (OUTPUT, OUTPUT + "        factors = []\n"),
        (TOTAL, "                factors.append(rescale)\n" + TOTAL),
        wasteful=True,
    ),
    Mistake(
        "factors_of_every_pair_kept_with_a_mask",
        "3.1",
        "small tensors count together",
        (OUTPUT, OUTPUT + "        factors = []\n"),
        (TOTAL, "                factors += [rescale] if mask is not None else []\n" + TOTAL),
        wasteful=True,
    ),
    Mistake(
        "integer_mask_of_keys_converted_whole",
        "3.1",
        "of torch.int32: cut and convert a mask block by block",
        (
            EXPANDED,
            """\
        if mask is not None and mask.size(2) == 1 and not mask.is_floating_point():
            mask = mask.bool()
"""
            + EXPANDED,
        ),
        wasteful=True,
    ),
    Mistake(
        "rows_that_see_nothing_one_by_one",
        "3.5",
        "treat rows that see nothing",
        (
            DIVIDE + LOGSUMEXP,
            """\
            for row in range(total.size(1)) if (total == 0).any() else ():
                total[:, row].masked_fill_(total[:, row] == 0, 1)
            logsumexp[:, rows] = maximum + total.log2()
            accumulator.div_(total)
            logsumexp[:, rows].masked_fill_(accumulator.eq(0).all(-1, keepdim=True), -math.inf)
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "diagonal_hidden_row_by_row",
        "3.5",
        "hide what is not seen",
        (
            "            scores.add_(scores.new_full(scores.shape[1:], -math.inf).triu_(above))\n",
            """\
            for row in range(scores.size(1)):
                scores[:, row, max(0, row + above) :] = -math.inf
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "expanded_mask_copied",
        "3.1",
        "made of the mask",
        (EXPANDED, EXPANDED.replace("mask.expand", "mask.contiguous().expand")),
        wasteful=True,
    ),
    Mistake(
        "blocks_above_the_diagonal_computed_with_a_mask_per_head",
        "3.5",
        "1.00 of the exponentials",
        (
            COLUMNS,
            COLUMNS.replace(
                "self.diagonal is None", "self.diagonal is None or (self.mask is not None and self.per_head)"
            ),
        ),
        (EXPANDED, "        self.per_head = mask is not None and mask.size(1) > 1\n" + EXPANDED),
        wasteful=True,
    ),
    Mistake(
        "blocks_above_the_diagonal_computed_with_a_mask_of_keys",
        "3.5",
        "whatever the mask",
        (
            COLUMNS,
            COLUMNS.replace(
                "self.diagonal is None", "self.diagonal is None or (self.mask is not None and self.of_keys)"
            ),
        ),
        (EXPANDED, "        self.of_keys = mask is not None and mask.size(2) == 1\n" + EXPANDED),
        wasteful=True,
    ),
    Mistake(
        "begun_again_when_the_maximum_rises",
        "3.5",
        "scores rise from key to key",
        (
            WEIGHTS,
            """\
                for start in range(0, columns.start, blocks.size) if (new_maximum - maximum > 8).any() else ():
                    for _ in range(4):
                        q_rows @ k[:, start : start + blocks.size].to(work).mT
"""
            + WEIGHTS,
        ),
        wasteful=True,
    ),
    Mistake(
        "heads_kept_for_a_later_look",
        "3.1",
        "leaves",
        (APPLY, "        self.last = [(Q, K, V)]\n" + APPLY),
        wasteful=True,
    ),
]
