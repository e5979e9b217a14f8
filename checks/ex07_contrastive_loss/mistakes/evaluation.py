"""Wrong answers to the evaluation (7.9)."""

from harness.model.bank import Mistake

NO_GRAD = "@torch.no_grad()\ndef zero_shot_weights("
STACK = "    return torch.stack([_unit(_unit(encode_text(texts)).mean(0)) for texts in prompts])\n"
PROMPTS = "    prompts = [[template.format(name) for template in templates] for name in class_names]\n"
HIT = "    hit = torch.eye(*similarity.shape, device=similarity.device) != 0 if positives is None else positives != 0\n"
BEST = "    best = similarity.masked_fill(~hit, -math.inf).amax(1, keepdim=True)  # [N, 1]\n"
RANKS = "    ranks = 1 + ((similarity >= best) & ~hit).sum(1)  # [N]\n"
FOUND = "    found = hit.any(1) & ~similarity.isnan().any(1)  # [N]\n"
SHARES = "    return {k: int((found & (ranks <= k)).sum()) / len(similarity) for k in ks}\n"


def stacked(row: str) -> tuple[str, str]:
    """Another row for each class."""
    return STACK, f"    return torch.stack([{row} for texts in prompts])\n"


def changed(line: str, old: str, new: str) -> tuple[str, str]:
    """A line with one thing changed."""
    assert old in line, "the mistake's own set-up holds"
    return line, line.replace(old, new)


MISTAKES = [
    Mistake("weights_of_zeros", "7.9", "differ", stacked("0 * _unit(encode_text(texts)).mean(0)"), only=True),
    Mistake(
        "raw_prompts_averaged", "7.9", "keep their lengths", stacked("_unit(encode_text(texts).mean(0))"), only=True
    ),
    Mistake(
        "not_normalised_again", "7.9", "not normalised after", stacked("_unit(encode_text(texts)).mean(0)"), only=True
    ),
    Mistake(
        "one_template",
        "7.9",
        "first template's alone",
        changed(PROMPTS, "in templates]", "in templates[:1]]"),
        only=True,
    ),
    Mistake(
        "alike_templates_once",
        "7.9",
        "differ",
        changed(PROMPTS, "in templates]", "in dict.fromkeys(templates)]"),
        only=True,
    ),
    Mistake(
        "replace_in_place_of_format",
        "7.9",
        "template.format(name)",
        changed(PROMPTS, "template.format(name)", 'template.replace("{}", name)'),
        only=True,
    ),
    Mistake(
        "classes_sorted",
        "7.9",
        "differ",
        changed(PROMPTS, "for name in class_names", "for name in sorted(class_names)"),
        only=True,
    ),
    Mistake(
        "classes_told_apart_by_name",
        "7.9",
        "shape",
        changed(PROMPTS, "for name in class_names", "for name in dict.fromkeys(class_names)"),
        only=True,
    ),
    Mistake("encoded_with_gradients", "7.9", "gradient tracking", (NO_GRAD, "def zero_shot_weights("), only=True),
    Mistake(
        "weights_detached_afterwards",
        "7.9",
        "gradient tracking",
        (NO_GRAD, "def zero_shot_weights("),
        stacked("_unit(_unit(encode_text(texts)).mean(0)).detach()"),
        only=True,
    ),
    Mistake(
        "gradients_left_off",
        "7.9",
        "gradients are off",
        (NO_GRAD, "def zero_shot_weights("),
        (PROMPTS, "    torch.set_grad_enabled(False)\n" + PROMPTS),
    ),
    Mistake(
        "texts_in_a_tuple",
        "7.9",
        "a list of texts",
        stacked("_unit(_unit(encode_text(tuple(texts))).mean(0))"),
        only=True,
    ),
    Mistake(
        "normalised_in_place",
        "7.9",
        "writes to what encode_text returns",
        stacked("_unit(_unit(encode_text(texts).div_(1.0)).mean(0))"),
        only=True,
    ),
    # Recall.
    Mistake("recall_of_1", "7.9", "was wanted", (SHARES, "    return {k: 1.0 for k in ks}\n"), only=True),
    Mistake("ties_as_hits", "7.9", "ties count against", changed(RANKS, ">=", ">"), only=True),
    Mistake(
        "ties_by_topk",
        "7.9",
        "ties count against",
        (
            SHARES,
            """    shares = {}
    for k in ks:
        top = similarity.topk(min(k, similarity.size(1))).indices
        shares[k] = int((found & hit.gather(1, top).any(1)).sum()) / len(similarity)
    return shares
""",
        ),
        only=True,
    ),
    Mistake("nan_as_rank_1", "7.9", "NaN score is missed", (FOUND, "    found = hit.any(1)\n"), only=True),
    Mistake(
        "nan_of_the_positive_alone",
        "7.9",
        "NaN score is missed",
        changed(FOUND, "~similarity.isnan().any(1)", "~similarity.masked_fill(~hit, 0.0).isnan().any(1)"),
        only=True,
    ),
    Mistake(
        "no_positive_as_the_last_rank",
        "7.9",
        "without a positive is missed",
        changed(FOUND, "hit.any(1) & ", ""),
        only=True,
    ),
    Mistake(
        "queries_without_a_positive_left_out",
        "7.9",
        "was wanted",
        changed(SHARES, "len(similarity)", "int(hit.any(1).sum())"),
        only=True,
    ),
    Mistake(
        "other_positives_as_negatives",
        "7.9",
        "best positive",
        changed(RANKS, "((similarity >= best) & ~hit).sum(1)", "(similarity >= best).sum(1) - 1"),
        only=True,
    ),
    Mistake(
        "worst_positive",
        "7.9",
        "best positive",
        (BEST, "    best = similarity.masked_fill(~hit, math.inf).amin(1, keepdim=True)\n"),
        only=True,
    ),
    Mistake(
        "recall_over_columns",
        "7.9",
        "was wanted",
        (HIT, "    similarity = similarity.mT if similarity.size(0) == similarity.size(1) else similarity\n" + HIT),
        only=True,
    ),
    Mistake(
        "tensors_as_shares",
        "7.9",
        "a Python number",
        (SHARES, "    return {k: (found & (ranks <= k)).double().mean() for k in ks}\n"),
        only=True,
    ),
    Mistake(
        "default_of_five_and_ten",
        "7.9",
        "keys",
        ("ks: Sequence[int] = (1, 5, 10)", "ks: Sequence[int] = (5, 10)"),
        only=True,
    ),
    Mistake(
        "positives_inverted_bit_by_bit",
        "7.9",
        "was wanted",
        changed(HIT, "else positives != 0", "else positives"),
        changed(BEST, "~hit", "hit == 0"),
        changed(RANKS, "~hit", "(~hit if not hit.is_floating_point() else hit == 0).bool()"),
        changed(FOUND, "hit.any(1)", "(hit != 0).any(1)"),
        only=True,
    ),
    Mistake(
        "positives_equal_1_as_bytes",
        "7.9",
        "was wanted",
        changed(HIT, "else positives != 0", "else positives.view(torch.uint8)[:, : positives.size(1)] != 0"),
        only=True,
    ),
    Mistake("lowest_number_for_infinity", "7.9", "low as they like", changed(BEST, "-math.inf", "-1e4"), only=True),
    Mistake(
        "nan_written_over",
        "7.9",
        "was wanted",
        (BEST, "    similarity = similarity.nan_to_num(-math.inf)\n" + BEST),
        only=True,
    ),
]
