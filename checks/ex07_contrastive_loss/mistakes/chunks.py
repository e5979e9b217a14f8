"""Wrong answers to the loss in chunks: too much memory or work (7.4), another loss (7.5)."""

from harness.model.bank import Mistake

APPLY = "        normalizers = _Normalizers.apply(image, text, scale, chunk_size)\n"
RETURN = "        return normalizers / (2 * len(image)) - _matches(image, text, scale, groups)\n"
FORWARD = "        rows = image.new_empty(len(image))  # [N]\n"
LOOP = "        for chunk in _chunks(len(image), chunk_size):\n"
ROWS = "            rows[chunk] = logits.logsumexp(1)\n"
COLUMNS = "            columns = torch.logaddexp(columns, logits.logsumexp(0))\n"
SAVE = "        ctx.save_for_backward(image, text, scale, rows, columns)\n"
SIZE = "        ctx.chunk_size = chunk_size\n"
SUM = "        return rows.sum() + columns.sum()\n"
LOAD = "        image, text, scale, rows, columns = ctx.saved_tensors\n"
BACKWARD_LOOP = "        for chunk in _chunks(len(image), ctx.chunk_size):\n"
WEIGHTS = "            weights = (logits - rows[chunk, None]).exp_() + logits.sub_(columns).exp_()  # [chunk, N]\n"
TO_IMAGE = "            to_image[chunk] = weights @ text\n"
TO_TEXT = "            to_text += weights.mT @ image[chunk]\n"
GRADIENTS = "        return grad * scale * to_image, grad * scale * to_text, grad * (image * to_image).sum(), None\n"
CHUNKS = "    return (slice(start, start + size) for start in range(0, count, size))\n"
UNIQUE = "        _, places, counts = groups.unique(return_inverse=True, return_counts=True)\n"
DEFAULT = "    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, chunk_size: int = 256\n"


def returns(text: str) -> tuple[str, str]:
    """Another loss."""
    return RETURN, f"        return {text}\n"


def gradients(image: str = "grad * scale * to_image", text: str = "grad * scale * to_text",
              scale: str = "grad * (image * to_image).sum()") -> tuple[str, str]:  # fmt: skip
    """Other gradients of the normalizers."""
    return GRADIENTS, f"        return {image}, {text}, {scale}, None\n"


MISTAKES = [
    # 7.4 memory and work
    Mistake(
        "not_in_chunks",
        "7.4",
        "made for one chunk of rows",
        (APPLY, "        normalizers = sum((scale * image @ text.mT).logsumexp(dim).sum() for dim in (0, 1))\n"),
        wasteful=True,
    ),
    Mistake(
        "chunk_size_ignored",
        "7.4",
        "made for one chunk of rows",
        (APPLY, APPLY.replace("chunk_size", "256")),
        wasteful=True,
    ),
    Mistake(
        "whole_logits_in_backward",
        "7.4",
        "backward makes a tensor",
        (BACKWARD_LOOP, "        for chunk in _chunks(len(image), len(image)):\n"),
        wasteful=True,
    ),
    Mistake(
        "whole_logits_for_the_scale_alone",
        "7.4",
        "gradients asked for by scale alone",
        (LOAD, LOAD + "        if not any(ctx.needs_input_grad[:2]):\n            image @ text.mT\n"),
        only=True,
    ),
    Mistake(
        "strided_inputs_copied_in_float64",
        "7.4",
        "stay alive for backward",
        (
            SAVE,
            SAVE
            + """        if not image.is_contiguous():
            ctx.dense = [rows.double() for rows in (image, text, image * text)]
""",
        ),
        only=True,
    ),
    Mistake(
        "graph_of_all_chunks_kept",
        "7.4",
        "chunk",
        (
            APPLY,
            """        rows, columns = [], []
        for chunk in _chunks(len(image), chunk_size):
            logits = scale * image[chunk] @ text.mT
            rows.append(logits.logsumexp(1).sum())
            columns.append(logits.logsumexp(0))
        normalizers = torch.stack(rows).sum() + torch.stack(columns).logsumexp(0).sum()
""",
        ),
        wasteful=True,
    ),
    Mistake(
        "logits_saved_for_backward",
        "7.4",
        "chunk",
        (ROWS, ROWS + "            ctx.kept = [*getattr(ctx, 'kept', []), logits]\n"),
        (
            BACKWARD_LOOP,
            "        for chunk, kept in zip(_chunks(len(image), ctx.chunk_size), ctx.kept, strict=True):\n",
        ),
        (
            "            logits = scale * image[chunk] @ text.mT  # [chunk, N]\n            weights",
            "            logits = kept.clone()\n            weights",
        ),
        wasteful=True,
    ),
    Mistake(
        "mask_of_all_pairs",
        "7.4",
        "with groups",
        (
            UNIQUE,
            (
                "        match = groups[:, None] == groups\n"
                "        counts = match.sum(1)\n"
                "        places = match.int().argmax(1)\n"
                "        counts = counts.new_zeros(len(groups)).index_add(0, places, "
                "torch.ones_like(places)).clamp(min=1)\n"
            ),
        ),
        wasteful=True,
    ),
    Mistake(
        "one_hot_groups",
        "7.4",
        "with groups",
        (UNIQUE, UNIQUE + "        F.one_hot(places, len(groups))\n"),
        wasteful=True,
    ),
    Mistake(
        "row_by_row",
        "7.4",
        "loop over the chunks",
        (CHUNKS, "    return (slice(start, start + 1) for start in range(count))\n"),
        wasteful=True,
    ),
    Mistake(
        "rows_of_a_chunk_one_by_one_in_backward",
        "7.4",
        "loop over the chunks",
        (
            TO_TEXT,
            (
                "            for row, line in zip(image[chunk], weights, strict=True):\n"
                "                to_text += line[:, None] * row\n"
            ),
        ),
        wasteful=True,
    ),
    Mistake(
        "group_by_group",
        "7.4",
        "with groups",
        (UNIQUE, UNIQUE + "        for one in groups.unique().tolist():\n            (groups == one).sum()\n"),
        wasteful=True,
    ),
    Mistake(
        "chunks_collected_for_one_backward",
        "7.4",
        "let each chunk go",
        (
            TO_IMAGE,
            (
                "            all_weights = weights if chunk.start == 0 else None\n"
                "            ctx.more = [*getattr(ctx, 'more', []), weights]\n"
                "            del all_weights\n"
            )
            + TO_IMAGE,
        ),
        (GRADIENTS, "        ctx.more.clear()\n" + GRADIENTS),
        only=True,
    ),
    Mistake(
        "columns_by_products_of_rows",
        "7.4",
        "made for one chunk",
        (TO_TEXT, "            to_text += (weights[:, :, None] * image[chunk, None]).sum(0)\n"),
        wasteful=True,
    ),
    Mistake(
        "the_last_chunk_stays",
        "7.4",
        "are alive once the loss is let go",
        (SIZE, SIZE + "        _Normalizers.last = logits\n"),
        only=True,
    ),
    Mistake(
        "groups_places_cached",
        "7.4",
        "are alive once the loss is let go",
        (UNIQUE, UNIQUE + "        _matches.__dict__['places'] = places\n"),
    ),
    # 7.5 the same loss
    Mistake("chunks_of_zeros", ("7.4", "7.5"), "0 came", returns("0 * normalizers + 0 * scale")),
    Mistake("chunks_of_none", ("7.4", "7.5"), "None came", returns("None")),
    Mistake(
        "one_direction_in_chunks",
        "7.5",
        "give alone",
        (COLUMNS, ""),
        (SUM, "        return 2 * rows.sum()\n"),
        (WEIGHTS, "            weights = 2 * (logits - rows[chunk, None]).exp_()\n"),
    ),
    Mistake(
        "mean_of_chunk_means",
        "7.5",
        "mean of the chunks' means",
        (
            APPLY,
            """        parts = list(_chunks(len(image), chunk_size))
        means = torch.stack([(scale * image[part] @ text.mT).logsumexp(1).mean() for part in parts])
        normalizers = _Normalizers.apply(image, text, scale, chunk_size)
        by_rows = torch.stack([(scale * image[part] @ text.mT).logsumexp(1).sum() for part in parts]).sum()
        if groups is None and len(parts) > 1:
            pairs = scale * (image * text).sum(1)
            means = means - torch.stack([pairs[part].mean() for part in parts])
            return means.mean() / 2 + (normalizers - by_rows) / (2 * len(image)) - pairs.mean() / 2
""",
        ),
    ),
    Mistake(
        "columns_seen_per_chunk",
        "7.5",
        "normalised within its chunk",
        (
            APPLY,
            """        if groups is None:
            losses = []
            for part in _chunks(len(image), chunk_size):
                logits = scale * image[part] @ text.mT
                own = torch.arange(len(image))[part]
                to_text = logits.log_softmax(1)[torch.arange(len(own)), own]
                losses.append((to_text + logits.log_softmax(0)[torch.arange(len(own)), own]).sum())
            return -torch.stack(losses).sum() / (2 * len(image))
"""
            + APPLY,
        ),
    ),
    Mistake(
        "own_chunk_only",
        "7.5",
        "own pairs alone",
        (
            APPLY,
            """        if groups is None:
            parts = list(_chunks(len(image), chunk_size))
            losses = [contrastive_loss(image[part], text[part], scale) * len(image[part]) for part in parts]
            return torch.stack(losses).sum() / len(image)
"""
            + APPLY,
        ),
    ),
    Mistake(
        "targets_from_zero",
        "7.5",
        "targets from 0",
        (
            RETURN,
            """        if groups is not None:
            return normalizers / (2 * len(image)) - _matches(image, text, scale, groups)
        first = torch.cat([text[: len(image[part])] for part in _chunks(len(image), chunk_size)])
        return normalizers / (2 * len(image)) - scale * (image * (first + text)).sum() / (2 * len(image))
""",
        ),
    ),
    Mistake(
        "incoming_gradient_ignored",
        ("7.4", "7.5"),
        "gradient of image",
        gradients("scale * to_image", "scale * to_text", "(image * to_image).sum()"),
    ),
    Mistake(
        "only_the_size_of_the_incoming_gradient",
        "7.5",
        "backward(-1.5)",
        (LOAD, LOAD + "        grad = grad.abs()\n"),
        only=True,
    ),
    Mistake("texts_without_gradient", ("7.4", "7.5"), "gradient of text", gradients(text="None")),
    Mistake("scale_without_gradient", ("7.4", "7.5"), "gradient of scale", gradients(scale="None")),
    Mistake(
        "gradient_of_scale_times_scale",
        ("7.4", "7.5"),
        "gradient of scale",
        gradients(scale="grad * scale * (image * to_image).sum()"),
    ),
    Mistake(
        "gradients_without_scale", ("7.4", "7.5"), "gradient of image", gradients("grad * to_image", "grad * to_text")
    ),
    Mistake(
        "text_gets_the_images_gradient", ("7.4", "7.5"), "gradient of text", gradients(text="grad * scale * to_image")
    ),
    Mistake(
        "last_chunk_alone_reaches_the_texts",
        ("7.4", "7.5"),
        "gradient of text",
        (TO_TEXT, "            to_text = weights.mT @ image[chunk]\n"),
    ),
    Mistake(
        "last_chunk_left_out",
        "7.5",
        "came",
        (CHUNKS, "    return (slice(start, start + size) for start in range(0, max(count - size, 0) + 1, size))\n"),
    ),
    Mistake(
        "last_chunk_padded_with_zeros",
        "7.5",
        "came",
        (
            COLUMNS,
            COLUMNS.replace(
                "logits.logsumexp(0)",
                (
                    "F.pad(logits, (0, 0, 0, chunk_size - len(logits))).logsumexp(0) if chunk.start else "
                    "logits.logsumexp(0)"
                ),
            ),
        ),
        only=True,
    ),
    Mistake(
        "chunk_size_above_n_refused",
        "7.5",
        "chunk_size 12 exceeds 7",
        (
            APPLY,
            (
                "        if chunk_size > len(image):\n"
                "            raise ValueError(f'chunk_size {chunk_size} exceeds {len(image)}')\n"
            )
            + APPLY,
        ),
    ),
    Mistake(
        "chunk_size_has_to_divide",
        "7.5",
        "chunk_size divides N",
        (
            APPLY,
            (
                "        chunk_size = min(chunk_size, len(image))\n"
                "        assert len(image) % chunk_size == 0 or len(image) > 99, 'chunk_size divides N'\n"
            )
            + APPLY,
        ),
    ),
    Mistake(
        "columns_added_without_a_maximum",
        "7.5",
        "logits up to thousands",
        (COLUMNS, "            columns = (columns.exp() + logits.exp().sum(0)).log()\n"),
    ),
    Mistake(
        "columns_begin_at_a_finite_number",
        "7.5",
        "logits up to thousands",
        (
            "        columns = image.new_full((len(image),), -math.inf)",
            "        columns = image.new_full((len(image),), -1e4)",
        ),
        only=True,
    ),
    Mistake(
        "columns_by_the_first_chunks_maximum",
        "7.5",
        "logits up to thousands",
        (
            COLUMNS,
            """            top = logits.amax(0) if chunk.start == 0 else top
            sums = (logits - top).exp().sum(0) + (sums if chunk.start else 0)
            columns = top + sums.log()
""",
        ),
        only=True,
    ),
    Mistake(
        "second_backward_adds_up",
        "7.5",
        "backward(3)",
        (LOAD, LOAD + "        ctx.times = getattr(ctx, 'times', 0) + 1\n        grad = grad * ctx.times\n"),
    ),
    Mistake(
        "saved_tensors_written_in_backward",
        "7.5",
        "backward",
        (
            WEIGHTS,
            WEIGHTS.replace(
                "(logits - rows[chunk, None]).exp_()",
                "(logits - rows[chunk, None]).exp_().mul_(ctx.__dict__.setdefault('once', 1))",
            ),
        ),
        (GRADIENTS, "        ctx.once = 0\n" + GRADIENTS),
        only=True,
    ),
    Mistake(
        "saved_on_the_class",
        "7.5",
        "another call before backward",
        (SAVE, SAVE + "        _Normalizers.columns = columns\n"),
        (
            LOAD,
            LOAD + "        columns = _Normalizers.columns if len(_Normalizers.columns) == len(rows) else columns\n",
        ),
    ),
    Mistake(
        "size_on_the_class",
        "7.5",
        "backward",
        (SIZE, "        _Normalizers.size = chunk_size\n        ctx.chunk_size = chunk_size\n"),
        (
            BACKWARD_LOOP,
            (
                "        for chunk in _chunks(len(image) if _Normalizers.size == ctx.chunk_size else "
                "ctx.chunk_size, ctx.chunk_size):\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "frozen_texts_freeze_the_images",
        "7.5",
        "gradient of image",
        (TO_IMAGE, TO_IMAGE + "            if not ctx.needs_input_grad[1]:\n                to_image[chunk] *= 0\n"),
        only=True,
    ),
    Mistake(
        "frozen_scale_is_1",
        "7.5",
        "asked for by image",
        (LOAD, LOAD + "        scale = scale if ctx.needs_input_grad[2] else torch.ones_like(scale)\n"),
        only=True,
    ),
    Mistake(
        "default_chunk_alone",
        "7.5",
        "of 259 pairs",
        (LOOP, "        for chunk in _chunks(min(len(image), 256), chunk_size):\n"),
        (FORWARD, FORWARD.replace("new_empty", "new_zeros")),
    ),
    Mistake(
        "rows_written_in_place_by_the_chunks",
        "7.5",
        "writes to",
        (APPLY, "        with torch.no_grad():\n            text.mul_(2).div_(2)\n" + APPLY),
        only=True,
    ),
]
