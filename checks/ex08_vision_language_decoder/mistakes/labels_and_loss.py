"""Wrong answers to labels and the loss (8.4)."""

from harness.model.bank import Mistake

IS_IMAGE = "        is_image = visible & (input_ids == self.image_token_id)  # [B, L]\n"
LEARNT = "            learnt = labels.flatten()[source].masked_fill(from_image, IGNORED)  # [N]\n"
LABELS = "            labels = labels.new_full(mask.shape, IGNORED).masked_scatter(mask, learnt)  # [B, S]\n"
TOWER = "        tokens = self.vision(images if first is None else images.to(first.dtype))  # [M, T, vision_dim]\n"
NO_LABELS = """        if merged.labels is None:
            return logits, None
"""
BEFORE = "        before = logits[:, :-1].flatten(0, 1).to(_at_least_float32(logits))  # [B·(S - 1), V]\n"
TARGETS = "        targets = merged.labels[:, 1:].flatten()  # [B·(S - 1)]\n"
TOTAL = '        total = F.cross_entropy(before, targets, ignore_index=IGNORED, reduction="sum")\n'
LOSS = "        return logits, total / (targets != IGNORED).sum().clamp(min=1)\n"
MEAN = "        return logits, F.cross_entropy(before, targets, ignore_index=IGNORED)\n"

MISTAKES = [
    Mistake("zero_loss", "8.4", "loss 0.0000 came", (LOSS, "        return logits, 0 * total\n")),
    Mistake("no_loss", "8.4", "None came", (LOSS, "        return logits, None\n")),
    Mistake(
        "image_tokens_learnt",
        "8.4",
        "image tokens and padding have -100",
        (".masked_fill(from_image, IGNORED)", ""),
        only=True,
    ),
    Mistake(
        "last_image_token_learnt",
        "8.4",
        "image tokens and padding have -100",
        (".masked_fill(from_image, IGNORED)", ".masked_fill(from_image & from_image.roll(-1), IGNORED)"),
        only=True,
    ),
    Mistake("padding_learnt", "8.4", "came", (LABELS, LABELS.replace("IGNORED", "0"))),
    Mistake("padding_ignored_by_another_number", "8.4", "came", (LABELS, LABELS.replace("IGNORED", "-1"))),
    Mistake(
        "labels_shifted_in_merge",
        "8.4",
        "came",
        (LABELS, LABELS + "            labels = labels.roll(-1, 1)\n"),
        only=True,
    ),
    Mistake(
        "labels_padded_on_the_right",
        "8.4",
        "do not stand at their tokens",
        (
            LABELS,
            LABELS
            + "            labels = labels.new_full(mask.shape, IGNORED).masked_scatter(columns < lengths, learnt)\n",
        ),
        only=True,
    ),
    Mistake(
        "labels_of_int32",
        "8.4",
        "torch.int32 came",
        (LABELS, LABELS + "            labels = labels.int()\n"),
    ),
    Mistake(
        "ids_are_the_labels",
        "8.4",
        "came without labels",
        (
            "        if labels is not None:\n            learnt",
            (
                "        labels = input_ids if labels is None else labels\n"
                "        if labels is not None:\n"
                "            learnt"
            ),
        ),
    ),
    Mistake(
        "labels_written_to",
        "8.4",
        "the ids",
        (LEARNT, "            labels[is_image] = IGNORED\n" + LEARNT),
    ),
    Mistake(
        "loss_not_shifted",
        "8.4",
        "forward([[9, P, 5, 6]])",
        (BEFORE + TARGETS, BEFORE.replace("[:, :-1]", "") + TARGETS.replace("[:, 1:]", "")),
        only=True,
    ),
    Mistake(
        "loss_shifted_twice",
        "8.4",
        "forward([[9, P, 5, 6]])",
        (BEFORE + TARGETS, BEFORE.replace(":-1", ":-2") + TARGETS.replace("1:", "2:")),
        only=True,
    ),
    Mistake(
        "loss_shifted_backwards",
        "8.4",
        "forward([[9, P, 5, 6]])",
        (BEFORE + TARGETS, BEFORE.replace(":-1", "1:") + TARGETS.replace("1:", ":-1")),
        only=True,
    ),
    Mistake(
        "loss_shifted_across_rows",
        "8.4",
        "in its own row",
        (
            BEFORE + TARGETS,
            BEFORE.replace("[:, :-1].flatten(0, 1)", ".flatten(0, 1)[:-1]")
            + TARGETS.replace("[:, 1:].flatten()", ".flatten()[1:]"),
        ),
        only=True,
    ),
    Mistake("sum_of_losses", "8.4", "forward([[9, P, 5, 6]])", (LOSS, "        return logits, total\n"), only=True),
    Mistake(
        "mean_over_places",
        "8.4",
        "forward([[9, P, 5, 6]])",
        (LOSS, "        return logits, total / max(len(targets), 1)\n"),
        only=True,
    ),
    Mistake(
        "mean_of_row_means",
        "8.4",
        "mean of each row's mean",
        (
            LOSS,
            """        rows = F.cross_entropy(before, targets, ignore_index=IGNORED, reduction="none")
        rows = rows.unflatten(0, (len(logits), -1))
        counts = (merged.labels[:, 1:] != IGNORED).sum(dim=1)
        return logits, (rows.sum(dim=1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1) + 0 * total
""",
        ),
    ),
    Mistake("nan_without_labels", "8.4", "nan came, 0 was wanted", (LOSS, MEAN), only=True),
    Mistake(
        "none_without_labels_that_count",
        "8.4",
        "None came",
        (LOSS, LOSS + ""),
        (TOTAL, "        if not (targets != IGNORED).any():\n            return logits, None\n" + TOTAL),
        only=True,
    ),
    Mistake(
        "constant_without_labels_that_count",
        "8.4",
        "cannot be back-propagated",
        (
            TOTAL,
            "        if not (targets != IGNORED).any():\n            return logits, logits.new_zeros(())\n" + TOTAL,
        ),
        only=True,
    ),
    Mistake(
        "counted_from_all_labels",
        "8.4",
        "1.0397 was wanted",
        (LOSS, LOSS.replace("(targets != IGNORED)", "(merged.labels != IGNORED)")),
        only=True,
    ),
    Mistake(
        "label_0_ignored",
        "8.4",
        "loss",
        (TOTAL, TOTAL.replace("before, targets,", "before, targets.masked_fill(targets == 0, IGNORED),")),
        only=True,
    ),
    Mistake(
        "loss_of_one_element", "8.4", "shape (1,) came", (LOSS, LOSS.replace("min=1)", "min=1)[None]")), only=False
    ),
    Mistake("loss_detached", "8.4", "gradient", (LOSS, LOSS.replace("total /", "total.detach() /"))),
    Mistake(
        "logits_detached_in_eval",
        "8.4",
        "in eval",
        (BEFORE, "        if not self.training:\n            logits = logits.detach()\n" + BEFORE),
        only=True,
    ),
    Mistake(
        "text_before_images_alone",
        "8.4",
        "loss",
        (
            TARGETS,
            "        after = F.pad(merged.labels[:, :-1] == IGNORED, (1, 0))[:, 1:].flatten()\n"
            + TARGETS
            + "        targets = targets.masked_fill(after & (targets != IGNORED).roll(1), IGNORED)\n",
        ),
    ),
    Mistake(
        "smoothed",
        "8.4",
        "forward([[9, P, 5, 6]])",
        (TOTAL, TOTAL.replace('reduction="sum"', 'reduction="sum", label_smoothing=0.1')),
        only=True,
    ),
    Mistake("labels_viewed", "8.4", "view size", ("labels.flatten()[source]", "labels.view(-1)[source]"), only=False),
    Mistake(
        "text_alone_without_gradient",
        "8.4",
        "gradient",
        (
            "        lengths = repeats.sum(dim=1, keepdim=True)  # [B, 1]\n",
            (
                "        if tokens is None and labels is not None:\n"
                "            embeds = embeds.detach()\n"
                "        lengths = repeats.sum(dim=1, keepdim=True)  # [B, 1]\n"
            ),
        ),
    ),
    Mistake(
        "labels_of_the_placeholders_id_hidden",
        "8.4",
        "not the label",
        (
            LEARNT,
            LEARNT.replace("(from_image,", "(from_image | (labels.flatten()[source] == self.image_token_id),"),
        ),
    ),
    Mistake(
        "towers_in_eval_in_no_grad",
        "8.4",
        "gets no gradient",
        (
            TOWER,
            """        trains = self.vision.training or not self.training
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
    """
            + TOWER,
        ),
    ),
]
