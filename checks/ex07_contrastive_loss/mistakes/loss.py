"""Wrong answers to the symmetric loss (7.3)."""

from harness.model.bank import Mistake

LOGITS = "        logits = scale * image @ text.mT  # [N, N]\n"
NORMALIZERS = "        normalizers = logits.logsumexp(0) + logits.logsumexp(1)  # [N]\n"
RETURN = "        return normalizers.mean() / 2 - _matches(image, text, scale, groups)\n"
UNIQUE = "        _, places, counts = groups.unique(return_inverse=True, return_counts=True)\n"
MEAN = "        text = (sums / counts[:, None])[places]  # [N, E]\n"
MATCHED = "    return scale * (image * text).sum() / len(image)\n"
SHAPES = "    if image.shape != text.shape:\n"
MATCH = """        match = torch.eye(len(image), dtype=torch.bool) if groups is None else groups[:, None] == groups
"""


def returns(text: str) -> tuple[str, str]:
    """Another loss."""
    return RETURN, f"        return {text}\n"


MISTAKES = [
    Mistake("loss_of_zeros", "7.3", "it is 0", returns("0 * normalizers.mean() + 0 * scale")),
    Mistake("loss_of_none", "7.3", "None came", returns("None")),
    Mistake("loss_per_pair", "7.3", "shape", returns("normalizers / 2 - scale * (image * text).sum(1)")),
    Mistake(
        "one_direction",
        ("7.3", "7.5", "7.6"),
        "images that look for texts give alone",
        (NORMALIZERS, "        normalizers = 2 * logits.logsumexp(1)  # [N]\n"),
        ("            columns = torch.logaddexp(columns, logits.logsumexp(0))\n", ""),
        ("        return rows.sum() + columns.sum()\n", "        return 2 * rows.sum()\n"),
        (
            "            weights = (logits - rows[chunk, None]).exp_() + logits.sub_(columns).exp_()  # [chunk, N]\n",
            "            weights = 2 * (logits - rows[chunk, None]).exp_()  # [chunk, N]\n",
        ),
        (
            '        loss = loss + F.cross_entropy(scale * text @ images.mT, own, reduction="sum")\n',
            "        loss = 2 * loss + 0 * images.sum()\n",
        ),
    ),
    Mistake(
        "texts_look_for_images_alone",
        "7.3",
        "texts that look for images give alone",
        (NORMALIZERS, "        normalizers = 2 * logits.logsumexp(0)  # [N]\n"),
    ),
    Mistake(
        "both_directions_added",
        "7.3",
        "sum of both directions",
        returns("normalizers.mean() - 2 * _matches(image, text, scale, groups)"),
    ),
    Mistake(
        "summed_over_the_pairs",
        "7.3",
        "sum over the pairs",
        returns("normalizers.sum() / 2 - len(image) * _matches(image, text, scale, groups)"),
    ),
    Mistake(
        "loss_normalises_too",
        "7.3",
        "rows of length 1",
        (LOGITS, "        image, text = _unit(image), _unit(text)\n" + LOGITS),
        only=True,
    ),
    Mistake(
        "scale_left_out",
        "7.3",
        "without the scale",
        (LOGITS, "        scale = torch.ones_like(scale)\n" + LOGITS),
        only=True,
    ),
    Mistake(
        "divided_by_the_scale",
        "7.3",
        "divided by the scale",
        (LOGITS, "        scale = 1 / scale\n" + LOGITS),
        only=True,
    ),
    Mistake(
        "scale_a_constant",
        "7.3",
        "gradient of scale: None",
        (LOGITS, "        scale = scale.detach()\n" + LOGITS),
        only=True,
    ),
    Mistake(
        "probabilities_before_the_log",
        "7.3",
        "was wanted",
        returns(
            "-(logits.softmax(1).diagonal().log() + logits.softmax(0).diagonal().log()).mean() / 2 "
            "if groups is None else normalizers.mean() / 2 - _matches(image, text, scale, groups)"
        ),
    ),
    Mistake(
        "exp_without_the_maximum",
        "7.3",
        "was wanted",
        (NORMALIZERS, "        normalizers = logits.exp().sum(0).log() + logits.exp().sum(1).log()\n"),
    ),
    Mistake(
        "an_epsilon_in_the_log",
        "7.3",
        "apart",
        (NORMALIZERS, "        normalizers = (logits.logsumexp(0).exp() + 1e-6).log() + logits.logsumexp(1)\n"),
    ),
    Mistake(
        "largest_logit_of_all",
        "7.3",
        "logits up to thousands",
        (
            NORMALIZERS,
            (
                "        top = logits.detach().max()\n"
                "        normalizers = 2 * top + ((logits - top).exp().sum(0) + 1e-300).log() + ((logits "
                "- top).exp().sum(1) + 1e-300).log()\n"
            ),
        ),
        only=True,
    ),
    Mistake("text_detached", "7.3", "gradient of text", (LOGITS, "        text = text.detach()\n" + LOGITS)),
    # Groups.
    Mistake(
        "groups_ignored",
        ("7.3", "7.5"),
        "without groups",
        ("    if groups is not None:\n", "    if groups is not None and False:\n"),
    ),
    Mistake(
        "matches_summed",
        "7.3",
        "sum over the matches",
        (
            RETURN,
            MATCH
            + "        return -(match * (logits.log_softmax(1) + logits.log_softmax(0).mT)).sum() / (2 * len(image))\n",
        ),
        only=True,
    ),
    Mistake(
        "log_of_their_sum",
        "7.3",
        "summed probability",
        (
            RETURN,
            MATCH
            + """        hidden = logits.masked_fill(~match, -math.inf)
        return (normalizers - hidden.logsumexp(1) - hidden.logsumexp(0)).mean() / 2
""",
        ),
        only=True,
    ),
    Mistake("group_sums_of_texts", ("7.3", "7.5"), "0.313262 came", (MEAN, "        text = sums[places]  # [N, E]\n")),
    Mistake(
        "ids_in_float",
        ("7.3", "7.5"),
        "9223372036854775807",
        (UNIQUE, UNIQUE.replace("groups.unique", "groups.double().unique")),
    ),
    Mistake(
        "ids_as_places",
        ("7.3", "7.5"),
        "groups [4, -1",
        (UNIQUE, "        places = groups % (int(groups.max()) + 1)\n        counts = places.bincount()\n"),
    ),
    Mistake(
        "negative_ids_match_nothing_else",
        ("7.3", "7.5"),
        "groups [4, -1",
        (UNIQUE, "        groups = torch.where(groups < 0, -torch.arange(1, len(groups) + 1), groups)\n" + UNIQUE),
    ),
    Mistake(
        "neighbours_alone_match",
        ("7.3", "7.5"),
        "groups [4, -1",
        (UNIQUE, UNIQUE.replace("groups.unique(", "groups.unique_consecutive(")),
    ),
    Mistake(
        "groups_sorted_first",
        ("7.3", "7.5"),
        "groups [4, -1",
        (UNIQUE, UNIQUE.replace("groups.unique", "groups.sort().values.unique")),
    ),
    Mistake(
        "ids_shifted_and_put_back",
        ("7.3", "7.5"),
        "groups",
        (UNIQUE, "        groups.sub_(1)\n" + UNIQUE + "        groups.add_(1)\n"),
    ),
    Mistake(
        "ids_shifted_behind_the_version_counter",
        ("7.3", "7.5"),
        "memory location",
        (UNIQUE, "        groups.data.sub_(1)\n" + UNIQUE + "        groups.data.add_(1)\n"),
    ),
    # Edges.
    Mistake(
        "shapes_unchecked",
        ("7.3", "7.5"),
        "was wanted",
        (SHAPES, "    if False:\n"),
    ),
    Mistake(
        "only_the_numbers_of_rows_checked",
        ("7.3", "7.5"),
        "ValueError was wanted",
        (SHAPES, "    if len(image) != len(text):\n"),
    ),
    Mistake(
        "inputs_of_a_refused_call_kept",
        ("7.3", "7.5"),
        "leaves nothing behind",
        (SHAPES, SHAPES + "        _check_shapes.__dict__.setdefault('refused', []).append(text)\n"),
    ),
    Mistake(
        "one_shape_named",
        ("7.3", "7.5"),
        "lacks",
        (
            """f"image is {tuple(image.shape)}, text is {tuple(text.shape)}; they must be alike\"""",
            """f"image is {tuple(image.shape)}; text must be alike\"""",
        ),
    ),
    Mistake(
        "rows_scaled_in_place",
        "7.3",
        "writes to",
        (LOGITS, "        with torch.no_grad():\n            image.mul_(2).div_(2)\n" + LOGITS),
        only=True,
    ),
    Mistake(
        "one_pair_is_nan",
        "7.3",
        "one pair",
        returns(
            "(normalizers.mean() / 2 - _matches(image, text, scale, groups)) * (len(image) - 1) / "
            "(len(image) - 1 or math.nan)"
        ),
        only=True,
    ),
    Mistake(
        "contiguous_memory_assumed",
        "7.3",
        "rows",
        (
            LOGITS,
            (
                "        if image.storage_offset() == 0 and image.is_floating_point():\n"
                "            text = text.as_strided(text.shape, (text.size(1), 1))\n"
            )
            + LOGITS,
        ),
        only=True,
    ),
    Mistake(
        "gradients_forgotten_where_texts_are_frozen",
        "7.3",
        "gradient",
        (LOGITS, "        scale = scale if text.requires_grad else scale.detach()\n" + LOGITS),
        only=True,
    ),
    Mistake(
        "the_last_loss_kept",
        "7.3",
        "alive",
        (LOGITS, LOGITS + "        contrastive_loss.__dict__['last'] = logits\n"),
        only=True,
    ),
]
