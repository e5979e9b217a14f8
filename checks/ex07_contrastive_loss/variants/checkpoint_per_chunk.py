"""torch.utils.checkpoint computes each chunk again in backward; sums over matches go by a mask of each chunk."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def _part(
    image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, groups: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk: the sum of its rows' logsumexps, its columns' logsumexps, the sum of the matches' mean logits."""
    logits = image @ text.t() * scale
    match = ids[:, None] == groups[None, :]
    return logits.logsumexp(1).sum(), logits.logsumexp(0), (logits * (match / sizes[:, None])).sum()


def chunked_contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, chunk_size: int = 256
) -> Tensor:
    """In chunks."""
    if image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)}, text {tuple(text.shape)}")
    n = len(image)
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        ids = torch.arange(n, device=image.device) if groups is None else groups
        rows, matches = image.new_zeros(()), image.new_zeros(())
        columns = image.new_full((n,), float("-inf"))
        for start in range(0, n, chunk_size):
            some = slice(start, start + chunk_size)
            sizes = (ids[some, None] == ids).sum(1)
            of_rows, of_columns, of_matches = checkpoint(
                _part, image[some], text, scale, ids[some], ids, sizes, use_reentrant=False
            )
            rows, matches = rows + of_rows, matches + of_matches
            columns = torch.logaddexp(columns, of_columns)
        return (rows + columns.sum() - 2 * matches) / (2 * n)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """By two cross entropies with shares as targets."""
    if image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)}, text {tuple(text.shape)}")
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        n = len(image)
        match = torch.eye(n, device=image.device) > 0 if groups is None else groups[:, None] == groups
        targets = match.to(image.dtype) / match.sum(1, keepdim=True)
        logits = scale * (image @ text.T)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def zero_shot_weights(
    encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """All prompts in one call."""
    with torch.inference_mode():
        prompts = [template.format(name) for name in class_names for template in templates]
        rows = encode_text(prompts)
        rows = F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1)
        rows = F.normalize(rows.unflatten(0, (len(class_names), len(templates))).mean(1), dim=1)
    return rows.clone()
