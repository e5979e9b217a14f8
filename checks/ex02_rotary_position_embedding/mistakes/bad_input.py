"""Wrong answers that accept what is to be refused, or refuse it without the numbers (2.8)."""

from harness.model.bank import Mistake

ODD = """\
        if dim % 2 != 0:
            raise ValueError(f"dim {dim} is odd; features turn in pairs")
"""
NONE = "        if seq_len is None:\n"
SMALL = """\
        if seq_len < length:
            raise ValueError(f"seq_len {seq_len} is less than the {length} rows of x")
"""
BAD_D_MODEL = "        if d_model % num_heads != 0:\n"
CHECK = "            self._check_mask(mask, scores_shape)\n"
FITS = (
    "        fits = mask.dim() == 4 and "
    "all(size in (1, full) for size, full in zip(mask.shape, scores_shape, strict=True))\n"
)
ODD_SINUS = """\
    if dim % 2 != 0:
        raise ValueError(f"dim {dim} is odd; sines and cosines come in pairs")
"""

MISTAKES = [
    Mistake("odd_dim_accepted", "2.8", "RotaryPositionEmbedding(7)", (ODD, ""), only=True),
    Mistake("odd_dim_without_the_number", "2.8", "lacks 7", (ODD, ODD.replace("{dim} is odd", "is odd")), only=True),
    Mistake(
        "odd_dim_asserted",
        "2.8",
        "ValueError was wanted",
        (ODD, ODD.replace("raise ValueError(", "raise AssertionError(")),
        only=True,
    ),
    Mistake("odd_sinusoidal_dim_accepted", "2.8", "sinusoidal_position_embedding", (ODD_SINUS, ""), only=True),
    Mistake(
        "small_seq_len_accepted", "2.8", "seq_len=13", (SMALL, "        seq_len = max(seq_len, length)\n"), only=True
    ),
    Mistake(
        "small_seq_len_without_numbers",
        "2.8",
        "lacks 13",
        (SMALL, SMALL.replace("{seq_len} is less than the {length} rows", "is less than the rows")),
        only=True,
    ),
    Mistake("seq_len_0_read_as_none", "2.8", "seq_len=0", (NONE, "        if not seq_len:\n"), only=True),
    Mistake(
        "seq_len_0_alone_accepted",
        "2.8",
        "seq_len=0",
        (SMALL, "        seq_len = seq_len or length\n" + SMALL.replace("if seq_len", "if 0 < seq_len")),
        only=True,
    ),
    Mistake(
        "bad_d_model_accepted",
        "2.8",
        "MultiHeadAttentionWithRoPE(10, 4)",
        (BAD_D_MODEL, "        if d_model < num_heads:\n"),
        only=True,
    ),
    Mistake("bad_masks_accepted", "2.8", "mask of shape", (CHECK, ""), only=True),
    Mistake("only_dimensions_checked", "2.8", "mask of shape", (FITS, "        fits = mask.dim() == 4\n"), only=True),
    Mistake(
        "broadcastable_is_enough",
        "2.8",
        "ValueError was wanted",
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
        "2.8",
        "lacks",
        (
            'raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to the scores\' {scores_shape}")',
            'raise ValueError("bad mask")',
        ),
        only=True,
    ),
    Mistake(
        "negative_seq_len_accepted",
        "2.8",
        "seq_len=-3",
        (SMALL, SMALL.replace("if seq_len", "if 0 <= seq_len")),
        only=True,
    ),
    Mistake(
        "masks_may_enlarge_the_keys",
        "2.8",
        "(1, 1, 1, 3)",
        (
            FITS,
            "        fits = mask.dim() == 4 and "
            "all(size in (1, full) for size, full in list(zip(mask.shape, scores_shape, strict=True))[:3]) and "
            "all(size == 1 or full in (1, size) for size, full in list(zip(mask.shape, scores_shape, strict=True))[3:])"
            "\n",
        ),
        only=True,
    ),
    Mistake(
        "masks_may_enlarge_the_heads",
        "2.8",
        "(1, 3, 1, 5)",
        (
            FITS,
            "        fits = mask.dim() == 4 and all(size == 1 or size == full or (i == 1 and full == 1) "
            "for i, (size, full) in enumerate(zip(mask.shape, scores_shape, strict=True)))\n",
        ),
        only=True,
    ),
    Mistake(
        "odd_head_accepted",
        "2.8",
        "MultiHeadAttentionWithRoPE(15, 3)",
        ("RotaryPositionEmbedding(d_model // num_heads, ", "RotaryPositionEmbedding(d_model // num_heads // 2 * 2, "),
        only=True,
    ),
]
