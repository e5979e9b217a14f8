"""Ranks gather logsumexps in place of gradients; each returns the whole loss; nothing is sent in backward."""

import torch
from torch import Tensor


def sharded_contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, comm: "Communicator") -> Tensor:
    """Over ranks."""
    with torch.autocast(image.device.type, enabled=False):
        image, text, scale = _wide(image, text, scale)
        images, texts = (torch.cat(comm.all_gather(rows)) for rows in (image, text))
        n = len(images)
        to_texts = scale * image @ texts.mT  # [n, N], with the gradients of this rank's images and of the scale
        to_images = scale.detach() * text @ images.mT  # [n, N], with those of its texts
        of_images, of_texts = to_texts.logsumexp(1), to_images.logsumexp(1)
        all_images, all_texts = (torch.cat(comm.all_gather(one)) for one in (of_images, of_texts))
        # What the other ranks' logsumexps have of these rows: p and q, whose logsumexps are constants here.
        others = (to_texts - all_texts).exp().sum() + (to_images - all_images).exp().sum()
        pairs = scale * (image * text).sum()
        share = of_images.sum() + of_texts.sum() - 2 * pairs
        carried = share + others
        value = comm.all_reduce(share.detach()) / (2 * n)
        return value + (carried - carried.detach()) * comm.world_size / (2 * n)
