"""Wrong answers in half precision and under autocast (7.8)."""

from harness.model.bank import Mistake

DTYPE = "    dtype = torch.float32\n    for tensor in tensors:\n"
CAST = "    return [tensor.to(dtype) for tensor in tensors]\n"
UNIT = "    (rows,) = _wide(rows)\n"
NORMALIZE = "    return F.normalize(rows, dim=-1)\n"
WIDE = "        (scale,) = _wide(self.logit_scale)\n"
RETURN = "        return _unit(image), _unit(text), scale.exp()\n"
LOGITS = "        logits = scale * image @ text.mT  # [N, N]\n"
PLAIN_RETURN = "        return normalizers.mean() / 2 - _matches(image, text, scale, groups)\n"
CHUNKED_RETURN = "        return normalizers / (2 * len(image)) - _matches(image, text, scale, groups)\n"
SHARDED_RETURN = "        return loss / (2 * sum(counts)) * comm.world_size\n"
AUTOCAST = (
    "    with torch.autocast(image.device.type, enabled=False):\n"
    "        image, text, scale = _wide(image, text, scale)\n"
)
SHAPES = "    _check_shapes(image, text)\n"
PLAIN_HEAD, CHUNKED_HEAD, SHARDED_HEAD = (
    SHAPES + AUTOCAST + LOGITS,
    SHAPES + AUTOCAST + "        normalizers = _Normalizers",
    AUTOCAST + "        counts",
)
ON = (
    "    with torch.autocast(image.device.type, dtype=torch.get_autocast_dtype(image.device.type), "
    "enabled=torch.is_autocast_enabled(image.device.type)):\n"
    "        image, text, scale = _wide(image, text, scale)\n"
)
NARROW = (
    "    with torch.autocast(image.device.type, enabled=False):\n"
    "        dtype = torch.promote_types(image.dtype, torch.promote_types(text.dtype, scale.dtype))\n"
    "        image, text, scale = (tensor.to(dtype) for tensor in (image, text, scale))\n"
)
GATHER = "        images, texts = (_Gather.apply(rows, comm, first) for rows in (image, text))  # [N, E]\n"
BACKWARD_WEIGHTS = "            to_image[chunk] = weights @ text\n"


def changed(whole: str, old: str, new: str) -> tuple[str, str]:
    """A text with one thing changed."""
    assert old in whole, "the mistake's own set-up holds"
    return whole, whole.replace(old, new)


MISTAKES = [
    Mistake("logits_in_half_precision", "7.8", "float32 or better", changed(PLAIN_HEAD, AUTOCAST, NARROW), only=True),
    Mistake("chunks_in_half_precision", "7.8", "float32 or better", changed(CHUNKED_HEAD, AUTOCAST, NARROW), only=True),
    Mistake("ranks_in_half_precision", "7.8", "float32 or better", changed(SHARDED_HEAD, AUTOCAST, NARROW), only=True),
    Mistake("autocast_left_on", "7.8", "autocast", changed(PLAIN_HEAD, AUTOCAST, ON), only=True),
    Mistake("autocast_left_on_in_chunks", "7.8", "autocast", changed(CHUNKED_HEAD, AUTOCAST, ON), only=True),
    Mistake("autocast_left_on_over_ranks", "7.8", "autocast", changed(SHARDED_HEAD, AUTOCAST, ON), only=True),
    Mistake(
        "autocast_off_for_bfloat16_alone",
        "7.8",
        "float16",
        changed(
            PLAIN_HEAD,
            "enabled=False",
            (
                "dtype=torch.float16, enabled=torch.is_autocast_enabled('cpu') and "
                "torch.get_autocast_dtype('cpu') == torch.float16"
            ),
        ),
        only=True,
    ),
    Mistake(
        "products_in_half_precision",
        "7.8",
        "loss is",
        (
            LOGITS,
            (
                "        low = torch.bfloat16 if image.dtype == torch.float32 and not image.is_leaf else "
                "image.dtype\n"
                "        logits = scale * (image.to(low) @ text.to(low).mT).to(image.dtype)\n"
            ),
        ),
    ),
    Mistake(
        "float32_rounded_at_the_end",
        "7.8",
        "float32 or better",
        (PLAIN_HEAD, PLAIN_HEAD.replace(AUTOCAST, "    kind = image.dtype\n" + AUTOCAST)),
        (PLAIN_RETURN, "        return (normalizers.mean() / 2 - _matches(image, text, scale, groups)).to(kind)\n"),
        only=True,
    ),
    Mistake(
        "chunked_loss_in_the_rows_dtype",
        "7.8",
        "float32 or better",
        (CHUNKED_HEAD, CHUNKED_HEAD.replace(AUTOCAST, "    kind = image.dtype\n" + AUTOCAST)),
        (
            CHUNKED_RETURN,
            "        return (normalizers / (2 * len(image)) - _matches(image, text, scale, groups)).to(kind)\n",
        ),
        only=True,
    ),
    Mistake(
        "one_dtype_asked_for",
        "7.8",
        "torch.float16 and torch.bfloat16",
        changed(
            PLAIN_HEAD,
            AUTOCAST,
            "    if image.dtype != text.dtype:\n        raise TypeError(f'{image.dtype} and {text.dtype}')\n"
            + AUTOCAST,
        ),
        only=True,
    ),
    Mistake(
        "scale_rounded_to_the_rows_dtype",
        "7.8",
        "loss is",
        (
            PLAIN_HEAD,
            PLAIN_HEAD.replace(
                AUTOCAST,
                "    scale = scale.to(image.dtype)\n" + AUTOCAST,
            ),
        ),
        only=True,
    ),
    Mistake(
        "gradients_of_chunks_in_half_precision",
        "7.8",
        "gradient of text",
        (
            "            to_text += weights.mT @ image[chunk]\n",
            (
                "            to_text += (weights.mT @ image[chunk]).bfloat16() if len(image) == 12 and "
                "weights.dtype == torch.float32 else weights.mT @ image[chunk]\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "texts_gradient_added_up_in_half_precision",
        "7.8",
        "round each gradient once",
        (CHUNKED_HEAD, CHUNKED_HEAD.replace(AUTOCAST, "    _Normalizers.kind = text.dtype\n" + AUTOCAST)),
        (
            "            to_text += weights.mT @ image[chunk]\n",
            "            to_text = (to_text + weights.mT @ image[chunk]).to(_Normalizers.kind).to(text.dtype)\n",
        ),
        only=True,
    ),
    Mistake(
        "gathered_in_half_precision",
        "7.8",
        "sharded_contrastive_loss",
        (
            GATHER,
            (
                "        low = torch.bfloat16 if image.dtype == torch.float32 and sum(counts) < 20 else "
                "image.dtype\n"
                "        images, texts = (_Gather.apply(rows.to(low), comm, first).to(image.dtype) for "
                "rows in (image, text))\n"
            ),
        ),
    ),
    # The head.
    Mistake("head_normalises_in_half_precision", "7.8", "normalise in float32", (UNIT, ""), only=True),
    Mistake(
        "rows_cast_after_normalising",
        "7.8",
        "length is off",
        (UNIT, ""),
        (NORMALIZE, "    (rows,) = _wide(F.normalize(rows, dim=-1))\n    return rows\n"),
        only=True,
    ),
    Mistake(
        "rows_rounded_to_half_precision",
        "7.8",
        "float32 or better",
        (
            RETURN,
            (
                "        kind = image_features.dtype\n"
                "        return _unit(image).to(kind), _unit(text).to(kind), scale.exp()\n"
            ),
        ),
        only=True,
    ),
    Mistake("scale_in_half_precision", "7.8", "scale has", (WIDE, "        scale = self.logit_scale\n"), only=True),
    Mistake(
        "squares_in_half_precision",
        "7.8",
        "length is off",
        (UNIT, "    squares = (rows * rows).sum(-1, keepdim=True)\n    rows, squares = _wide(rows, squares)\n"),
        (NORMALIZE, "    return rows / squares.clamp(min=1e-24).sqrt()\n"),
        only=True,
    ),
    Mistake(
        "epsilon_for_half_precision",
        "7.8",
        "features around 1e-05",
        (NORMALIZE, "    return F.normalize(rows, dim=-1, eps=1e-12 if rows.dtype == torch.float64 else 1e-4)\n"),
        only=True,
    ),
]
