"""Wrong answers to the loss over ranks: another loss (7.6), too much memory (7.7)."""

from harness.model.bank import Mistake

COUNTS = "        counts = [int(count) for count in comm.all_gather(torch.tensor(len(image)))]\n"
FIRST = "        first = sum(counts[: comm.rank])\n"
GATHER = "        images, texts = (_Gather.apply(rows, comm, first) for rows in (image, text))  # [N, E]\n"
OWN = "        own = torch.arange(first, first + len(image), device=image.device)  # [n]\n"
TO_TEXT = '        loss = F.cross_entropy(scale * image @ texts.mT, own, reduction="sum")\n'
TO_IMAGE = '        loss = loss + F.cross_entropy(scale * text @ images.mT, own, reduction="sum")\n'
RETURN = "        return loss / (2 * sum(counts)) * comm.world_size\n"
BACKWARD = "        return ctx.comm.all_reduce(grad)[ctx.own], None, None\n"
CONCAT = "        return torch.cat(comm.all_gather(rows))\n"


def returns(text: str) -> tuple[str, str]:
    """Another loss of a rank."""
    return RETURN, f"        return {text}\n"


MISTAKES = [
    Mistake("ranks_of_zeros", ("7.6", "7.7"), "came", returns("0 * loss")),
    Mistake("ranks_of_none", ("7.6", "7.7"), "None came", returns("None")),
    Mistake(
        "local_negatives_only",
        ("7.6", "7.7"),
        "own pairs alone",
        (GATHER, "        images, texts, first = image, text, 0\n"),
        returns("loss / (2 * len(image))"),
    ),
    Mistake(
        "gathered_without_gradient",
        ("7.6", "7.7"),
        "rows that others gathered get no gradient",
        (GATHER, "        images, texts = (torch.cat(comm.all_gather(rows)) for rows in (image, text))\n"),
    ),
    Mistake(
        "own_part_only",
        ("7.6", "7.7"),
        "the own part of the gathered rows alone",
        (BACKWARD, "        return grad[ctx.own], None, None\n"),
    ),
    Mistake("shares_not_scaled", ("7.6", "7.7"), "divided by the number of ranks", returns("loss / (2 * sum(counts))")),
    Mistake(
        "value_scaled_gradients_not",
        ("7.6", "7.7"),
        "times the formula's",
        returns("(loss + (comm.world_size - 1) * loss.detach()) / (2 * sum(counts))"),
    ),
    Mistake(
        "world_times_on_the_scale_too",
        "7.6",
        "mean gradient of scale",
        (TO_TEXT, "        scale = scale * comm.world_size - (scale * (comm.world_size - 1)).detach()\n" + TO_TEXT),
        only=True,
    ),
    Mistake(
        "scale_reduced_twice",
        "7.6",
        "mean gradient of scale",
        (
            TO_TEXT,
            (
                "        if scale.requires_grad:\n"
                "            scale = scale * 1\n"
                "            scale.register_hook(comm.all_reduce)\n"
            )
            + TO_TEXT,
        ),
        only=True,
    ),
    Mistake(
        "gathered_gradients_averaged",
        ("7.6", "7.7"),
        "gradient of",
        (BACKWARD, "        return ctx.comm.all_reduce(grad)[ctx.own] / ctx.comm.world_size, None, None\n"),
    ),
    Mistake(
        "gathered_gradients_of_the_first_rows",
        ("7.6", "7.7"),
        "gradient of",
        (BACKWARD, "        return ctx.comm.all_reduce(grad)[: ctx.own.stop - ctx.own.start], None, None\n"),
    ),
    Mistake(
        "labels_without_offset",
        ("7.6", "7.7"),
        "labels from 0 on every rank",
        (OWN, "        own = torch.arange(len(image), device=image.device)\n"),
    ),
    Mistake(
        "offset_rank_times_n",
        "7.6",
        "came",
        (
            OWN,
            (
                "        own = torch.arange(comm.rank * len(image), (comm.rank + 1) * "
                "len(image)).clamp(max=sum(counts) - 1)\n"
            ),
        ),
    ),
    Mistake("mean_of_the_ranks_means", ("7.6", "7.7"), "mean of the ranks' means", returns("loss / (2 * len(image))")),
    Mistake(
        "equal_ranks_assumed",
        "7.6",
        "came",
        returns("loss / (2 * len(image) * comm.world_size) * comm.world_size"),
    ),
    Mistake(
        "images_alone_look_for_texts_on_ranks",
        ("7.6", "7.7"),
        "give alone",
        (TO_IMAGE, "        loss = 2 * loss + 0 * images.sum()\n"),
    ),
    Mistake(
        "one_side_gathered_with_gradient",
        ("7.6",),
        "rows that others gathered get no gradient",
        (GATHER, GATHER + "        images = images.detach()\n"),
    ),
    Mistake(
        "ranks_in_reverse",
        ("7.6", "7.7"),
        "came",
        (CONCAT, "        return torch.cat(comm.all_gather(rows)[::-1])\n"),
    ),
    Mistake(
        "one_gather_for_one_tensor",
        "7.6",
        "rank",
        (
            GATHER,
            """        images = _Gather.apply(image, comm, first)
        texts = images if text is image else _Gather.apply(text, comm, first)
""",
        ),
        only=True,
    ),
    Mistake(
        "gather_where_gradients_are_asked_for",
        "7.6",
        "rank",
        (
            GATHER,
            """        if comm.rank and not (image.requires_grad or text.requires_grad):
            comm.all_gather(image)
"""
            + GATHER,
        ),
        only=True,
    ),
    Mistake(
        "a_call_more_on_larger_ranks",
        "7.6",
        "rank",
        (
            GATHER,
            GATHER + "        if len(image) > sum(counts) / comm.world_size:\n            comm.all_gather(image)\n",
        ),
        (RETURN, RETURN),
    ),
    Mistake(
        "reduced_by_the_number_of_own_rows",
        "7.6",
        "the ranks' calls differ",
        (BACKWARD, "        ctx.comm.all_reduce(grad[ctx.own])\n" + BACKWARD),
    ),
    Mistake(
        "backward_reduces_in_the_last_rank_only",
        ("7.6", "7.7"),
        "has ended without that call",
        (
            BACKWARD,
            "        if ctx.comm.rank == 0 and ctx.comm.world_size > 1:\n            return grad[ctx.own], None, None\n"
            + BACKWARD,
        ),
    ),
    Mistake(
        "rows_of_ranks_written_in_place",
        "7.6",
        "modified by an inplace",
        (COUNTS, "        with torch.no_grad():\n            text.mul_(2).div_(2)\n" + COUNTS),
        only=True,
    ),
    Mistake(
        "no_maximum_on_ranks",
        "7.6",
        "logits up to thousands",
        (
            TO_TEXT,
            (
                "        logits = scale * image @ texts.mT\n"
                "        loss = (logits.exp().sum(1).log() - logits.gather(1, own[:, None])[:, "
                "0]).sum()\n"
            ),
        ),
    ),
    Mistake(
        "one_rank_divides_by_0",
        "7.6",
        "NaN",
        returns("loss / (2 * sum(counts)) * (comm.world_size if comm.world_size > 1 else math.nan)"),
    ),
    Mistake(
        "frozen_images_leave_the_texts_alone",
        "7.6",
        "gradient of text",
        (GATHER, GATHER + "        if not image.requires_grad:\n            texts = texts.detach()\n"),
    ),
    # 7.7 memory of a rank
    Mistake(
        "full_logits_on_every_rank",
        "7.7",
        "not all with all",
        (
            TO_TEXT,
            (
                "        loss = F.cross_entropy((scale * images @ texts.mT)[first : first + len(image)] "
                '+ 0 * scale * (image.sum() - image.detach().sum()), own, reduction="sum")\n'
            ),
        ),
    ),
    Mistake(
        "whole_loss_on_every_rank",
        "7.7",
        "not all with all",
        returns("contrastive_loss(images, texts, scale)"),
    ),
    Mistake(
        "full_mask_on_every_rank",
        "7.7",
        "not all with all",
        (OWN, OWN + "        torch.eye(sum(counts), dtype=torch.bool)\n"),
        wasteful=True,
    ),
    Mistake(
        "rows_padded_to_the_largest_rank",
        "7.7",
        "not all with all",
        (TO_TEXT, "        F.pad(image, (0, 0, 0, max(counts) - len(image))) @ texts.mT\n" + TO_TEXT),
        wasteful=True,
    ),
    Mistake(
        "logits_gathered",
        "7.7",
        "not all with all",
        (TO_IMAGE, TO_IMAGE + "        torch.cat(comm.all_gather(scale * image @ texts.mT))\n"),
        wasteful=True,
    ),
    Mistake(
        "full_logits_in_backward",
        "7.7",
        "not all with all",
        (BACKWARD, "        grad @ grad.mT\n" + BACKWARD),
        wasteful=True,
    ),
    Mistake(
        "products_of_all_features",
        "7.7",
        "not all with all",
        (
            TO_IMAGE,
            '        loss = loss + F.cross_entropy(scale * (text[:, None] * images).sum(2), own, reduction="sum")\n',
        ),
        only=True,
    ),
]
