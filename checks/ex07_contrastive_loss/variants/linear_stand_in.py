"""No Function: the value is computed without gradients, and a linear stand-in of the value 0 carries them."""

import math

import torch
from torch import Tensor


def _stand_in(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The value, whose derivatives by some tensors are given."""
    for tensor, gradient in pairs:
        if tensor.requires_grad:
            line = (tensor * gradient).sum()
            value = value + (line - line.detach())
    return value


def chunked_contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, chunk_size: int = 256
) -> Tensor:
    """In chunks."""
    if image.shape != text.shape:
        raise ValueError(f"shapes {tuple(image.shape)} != {tuple(text.shape)}")
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        value, gradients = _with_gradients(image.detach(), text.detach(), scale.detach(), groups, chunk_size)
        return _stand_in(value, *zip((image, text, scale), gradients, strict=True))


@torch.no_grad()
def _with_gradients(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None, chunk_size: int
) -> tuple[Tensor, list[Tensor]]:
    n = len(image)
    ids = torch.arange(n, device=image.device) if groups is None else groups
    parts = [slice(start, min(n, start + chunk_size)) for start in range(0, n, chunk_size)]
    rows, columns = torch.empty_like(image[:, 0]), torch.full_like(image[:, 0], -math.inf)
    for part in parts:
        logits = scale * (image[part] @ text.mT)
        rows[part] = logits.logsumexp(1)
        columns = torch.logaddexp(columns, logits.logsumexp(0))
    value, of_image, of_text = image.new_zeros(()), torch.empty_like(image), torch.zeros_like(text)
    of_scale = image.new_zeros(())
    for part in parts:
        products = image[part] @ text.mT
        logits = scale * products
        match = ids[part, None] == ids
        weights = match.to(logits.dtype) / match.sum(1, keepdim=True)
        to_text, to_image = logits - rows[part, None], logits - columns
        value -= (weights * (to_text + to_image)).sum() / (2 * n)
        errors = (to_text.exp() + to_image.exp() - 2 * weights) / (2 * n)
        of_image[part] = scale * errors @ text
        of_text += scale * errors.mT @ image[part]
        of_scale += (errors * products).sum()
    return value, [of_image, of_text, of_scale]
