"""Wrong answers to ex01: masks misread, ignored or wrongly refused, and rows that may attend to nothing (1.2)."""

from harness.model.bank import Mistake

APPLIED = "            scores = self.apply_mask(scores, mask)\n"
ZEROED = "            weights = weights * mask.bool()\n"
FILLED = "        return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)\n"
LOWEST = "torch.finfo(scores.dtype).min"
FITS = """\
        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, scores_shape, strict=True))
"""
REFUSED = "        if not fits:\n"

MISTAKES = [
    Mistake("inverted_mask", "1.2", "true in the mask", ("mask == 0", "mask != 0")),
    Mistake(
        "mask_ignored", "1.2", "weight exactly 0", (FILLED, "        return scores\n"), (ZEROED, "            pass\n")
    ),
    Mistake("integer_mask_inverted_bitwise", "1.2", "true in the mask", ("mask == 0", "(~mask).bool()")),
    Mistake("only_bool_masks", "1.2", "boolean mask", ("mask == 0", "~mask")),
    Mistake("nan_for_masked_rows", "1.2", "NaN", (LOWEST, 'float("-inf")'), (ZEROED, "            pass\n")),
    Mistake(
        "nan_in_the_gradient",
        "1.2",
        "gradient is not finite",
        (FILLED, '        return scores + torch.where(mask.bool(), 0.0, float("-inf")).to(scores)\n'),
        (
            ZEROED,
            "            weights = torch.where(mask.bool().any(-1, keepdim=True), weights, "
            "torch.zeros((), dtype=weights.dtype, device=weights.device))\n",
        ),
    ),
    Mistake("uniform_masked_rows", "1.2", "weights", (ZEROED, "            pass\n")),
    Mistake("small_fill", "1.2", "forbidden weights", (LOWEST, "-20.0")),
    Mistake("fill_of_1e4", "1.2", "forbidden weights", (LOWEST, "-1e4"), only=True),
    Mistake("mask_times_scores", "1.2", "weight exactly 0", (FILLED, "        return scores * mask\n")),
    Mistake("mask_after_softmax", "1.2", "mask", (APPLIED, "            pass\n")),
    Mistake("mask_of_the_first_row_for_all", "1.2", "mask", (APPLIED, "            mask = mask[:1]\n" + APPLIED)),
    Mistake(
        "mask_of_the_first_head_for_all",
        "1.2",
        "mask of shape",
        (APPLIED, "            mask = mask[:, :1]\n" + APPLIED),
        only=True,
    ),
    Mistake(
        "bad_masks_accepted",
        "1.2",
        "mask of shape",
        ("            self._check_mask(mask, scores_shape)\n", "            pass\n"),
        only=True,
    ),
    Mistake("only_dimensions_checked", "1.2", "mask of shape", (FITS, "        fits = mask.dim() == 4\n"), only=True),
    Mistake(
        "broadcastable_is_enough",
        "1.2",
        "was accepted",
        (
            FITS,
            """\
        try:
            torch.broadcast_shapes(mask.shape, scores_shape)
            fits = mask.dim() == 4
        except RuntimeError:
            fits = False
""",
        ),
        only=True,
    ),
    Mistake(
        "mask_error_without_shapes",
        "1.2",
        "lacks",
        (
            'raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to the scores\' {scores_shape}")',
            'raise ValueError("bad mask")',
        ),
        only=True,
    ),
    Mistake(
        "bad_d_model_accepted",
        "1.2",
        "MultiHeadAttention(10, 4)",
        ("        if d_model % num_heads != 0:\n", "        if d_model < num_heads:\n"),
        only=True,
    ),
    Mistake(
        "d_model_asserted",
        "1.2",
        "ValueError was wanted",
        (
            '            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")\n',
            '            raise AssertionError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")\n',
        ),
        only=True,
    ),
    # Narrow code: right in the sizes, modes and masks that come first to mind.
    Mistake(
        "mask_made_a_bias_in_place",
        "1.2",
        "values differ",
        (
            FILLED,
            """\
        bias = mask.to(scores.dtype)
        bias -= 1
        return scores.masked_fill(bias != 0, torch.finfo(scores.dtype).min)
""",
        ),
        (ZEROED, "            weights = weights * allowed\n"),
        (APPLIED, "            allowed = mask.bool()\n" + APPLIED),
    ),
    Mistake("mask_dtype_promotes", "1.2", "scalar type", (ZEROED, "            weights = weights * mask\n")),
    Mistake(
        "rows_masked_in_one_head_only",
        "1.2",
        "head 1",
        (ZEROED, "            weights = weights * mask.bool().any(dim=-1, keepdim=True).any(dim=1, keepdim=True)\n"),
        only=True,
    ),
    Mistake(
        "apply_mask_for_bool_alone",
        "1.2",
        "",
        ("mask == 0", "~mask"),
        (APPLIED, "            mask = mask.bool()\n" + APPLIED),
        only=True,
    ),
    Mistake("fill_of_65504", "1.2", "forbidden weights", (LOWEST, "-65504.0"), only=True),
    Mistake(
        "keys_may_be_enlarged",
        "1.2",
        "ValueError was wanted",
        (
            REFUSED,
            "        fits = fits or (mask.dim() == 4 and scores_shape[3] == 1 and mask.shape[:3] == (1, 1, 1))\n"
            + REFUSED,
        ),
        only=True,
    ),
    Mistake(
        "heads_may_be_enlarged",
        "1.2",
        "ValueError was wanted",
        (
            REFUSED,
            """\
        fits = fits or (mask.dim() == 4 and scores_shape[1] == 1 and mask.shape[2:] == (1, 1) and mask.size(0) == 1)
"""
            + REFUSED,
        ),
        only=True,
    ),
    # What one situation hides: state from an earlier call, special sizes, hidden keys that are large.
    Mistake(
        "mask_known_by_identity",
        "1.2",
        "edited",
        (
            APPLIED,
            """\
            if getattr(self, '_known', None) is not mask:
                self._known, self._allowed = mask, mask.bool()
            mask = self._allowed
"""
            + APPLIED,
        ),
    ),
    Mistake(
        "good_shapes_remembered",
        "1.2",
        "fitted the last call",
        ("        self.num_heads = num_heads\n", "        self.num_heads = num_heads\n        self._good = set()\n"),
        (
            "            self._check_mask(mask, scores_shape)\n",
            """\
            if mask.shape not in self._good:
                self._check_mask(mask, scores_shape)
                self._good.add(mask.shape)
""",
        ),
        only=True,
    ),
    Mistake(
        "one_query_sees_all",
        "1.2",
        "a mask",
        (APPLIED, "            mask = mask if query.size(1) > 1 else torch.ones_like(mask)\n" + APPLIED),
        only=True,
    ),
    Mistake(
        "allowed_keys_counted_in_uint8",
        "1.2",
        "256 keys",
        (
            ZEROED,
            ZEROED + "            weights = weights * mask.sum(-1, keepdim=True, dtype=mask.dtype).bool()\n",
        ),
        only=True,
    ),
    Mistake(
        "maximum_of_hidden_keys_too",
        "1.2",
        "",
        (
            APPLIED + "        weights = scores.softmax(dim=-1)\n",
            """\
            top = scores.detach().amax(-1, keepdim=True)
            powers = (scores - top).exp() * mask.bool()
            scores = powers / powers.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        weights = scores if mask is not None else scores.softmax(dim=-1)
""",
        ),
    ),
    Mistake(
        "first_block_of_keys_hidden",
        "1.2",
        "all but the last",
        (
            "        weights = scores.softmax(dim=-1)\n",
            """\
        weights = scores.softmax(dim=-1)
        if mask is not None and scores.size(-1) > 512:
            weights = weights * mask[..., :512].bool().any(-1, keepdim=True)
""",
        ),
        only=True,
    ),
    Mistake(
        "rows_of_the_first_block_of_queries",
        "1.2",
        "weights of hidden keys",
        (
            APPLIED,
            """\
            if mask.size(2) > 512:
                mask = torch.cat([mask[:, :, :512]] * 3, dim=2)[:, :, : mask.size(2)]
"""
            + APPLIED,
        ),
        only=True,
    ),
    Mistake(
        "open_mask_known_by_version",
        "1.2",
        "edited in place",
        (
            APPLIED,
            """\
            name = (id(mask), mask._version if not mask.is_inference() else None)
            if getattr(self, '_open', (None, True))[0] != name:
                self._open = (name, bool((mask != 0).all()))
            if self._open[1] and not mask.is_inference():
                mask = torch.ones_like(mask[:1, :1, :1, :1])
"""
            + APPLIED,
        ),
        only=True,
    ),
]
