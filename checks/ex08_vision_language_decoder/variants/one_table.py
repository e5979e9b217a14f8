"""Embeddings, image tokens and a row of zeros are one table, and every place looks itself up in it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VisionLanguageModel(nn.Module):
    """One look-up."""

    def __init__(
        self, vision: nn.Module, decoder: Decoder, vision_dim: int, image_token_id: int, pad_token_id: int = 0
    ) -> None:
        super().__init__()
        self.image_token_id = image_token_id
        self.pad_token_id = pad_token_id
        self.vision = vision
        self.projector = Projector(vision_dim, decoder.d_model)
        self.decoder = decoder
        self.frozen_tower = False

    def merge(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
    ) -> Merged:
        """Sorts tokens to the front or to the end of their rows."""
        b, length = input_ids.shape
        visible = input_ids == input_ids
        if attention_mask is not None:
            visible = attention_mask.to(torch.bool)
        holes = visible.logical_and(input_ids.eq(self.image_token_id))
        found, given = holes.sum().item(), 0 if images is None else images.size(0)
        if found != given:
            raise ValueError(f"found {found} placeholders; {given} images were given")
        weight = self.decoder.embed.weight
        parts, t = [weight, weight.new_zeros(1, weight.size(1))], 1
        if images is not None and given:
            parameters = list(self.vision.parameters())
            tokens = self.vision(images.to(dtype=parameters[0].dtype) if parameters else images)
            tokens = self.projector(tokens.to(self.projector.fc2.weight.dtype))
            parts.append(tokens.to(weight.dtype).flatten(0, 1))
            t = tokens.size(1)
        table = torch.cat(parts)
        blank = len(weight)
        # [B, L, T]: every id has T cells, of which text fills the first.
        number = holes.flatten().cumsum(0).view(b, length) - 1
        cells = (blank + 1 + number[..., None] * t) + torch.arange(t, device=input_ids.device)
        text = torch.full_like(cells, -1)
        text[..., 0] = torch.where(visible, input_ids, -1)
        cells = torch.where(holes[..., None], cells, text).flatten(1)
        used = torch.where(holes[..., None], True, (text >= 0) & visible[..., None]).flatten(1)
        order = used.long().argsort(dim=1, descending=padding_side == "right", stable=True)
        width = int(used.sum(1).max())
        order = order[:, :width] if padding_side == "right" else order[:, order.size(1) - width :]
        mask = used.gather(1, order)
        index = cells.gather(1, order).masked_fill(~mask, blank)
        positions = mask.long().cumsum(1).sub(1).masked_fill(~mask.bool(), 10**6)
        targets = None
        if labels is not None:
            wide = torch.full((*holes.shape, t), -100, device=input_ids.device)
            wide[..., 0] = labels.masked_fill(holes, -100)
            targets = wide.flatten(1).gather(1, order).masked_fill(~mask, -100)
        return Merged(F.embedding(index, table), mask, positions, targets)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss row by row."""
        embeds, mask, positions, targets = self.merge(input_ids, images, attention_mask, labels)
        logits, _ = self.decoder(embeds, mask, positions, None)
        if targets is None:
            return logits, None
        exact = logits.double()
        total, count = exact.sum() * 0.0, 0
        for row, learnt in zip(exact, targets, strict=True):
            places = learnt[1:].ne(-100).nonzero().flatten()
            for place in places.tolist():
                total = total + torch.logsumexp(row[place], 0) - row[place, learnt[place + 1]]
                count += 1
        return logits, total if not count else total / count

    def set_stage(self, stage: int) -> None:
        """By sets of parameters."""
        if stage not in {1, 2}:
            raise ValueError(f"set_stage({stage}): 1 or 2")
        trained = {*self.projector.parameters()} | ({*self.decoder.parameters()} if stage == 2 else set())
        for parameter in self.parameters():
            parameter.requires_grad_(parameter in trained)
            parameter.grad = parameter.grad if parameter in trained else None
        self.frozen_tower = True
        self.vision.eval()

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Then the tower again."""
        result = super().train(mode)
        if self.frozen_tower:
            for module in self.vision.modules():
                module.training = False
        return result

    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """Recursion."""
        with torch.no_grad():
            merged = self.merge(input_ids, images, attention_mask, padding_side="left")
            ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            return self._more(merged, None, ended, max_new_tokens, eos_token_id)

    def _more(self, merged: Merged, cache: Cache | None, ended: Tensor, left: int, eos: int | None) -> Tensor:
        logits, cache = self.decoder(merged.inputs_embeds, merged.attention_mask, merged.position_ids, cache)
        best = logits[:, -1].topk(1).indices
        column = best.masked_fill(ended[:, None], self.pad_token_id)
        if eos is not None:
            ended = ended | (best[:, 0] == eos)
        if left == 1 or bool(ended.all()):
            rest = column.new_full((len(column), left - 1), self.pad_token_id)
            return torch.cat([column, rest], dim=1)
        following = Merged(
            self.decoder.embed(best),
            F.pad(merged.attention_mask, (0, 1), value=True),
            merged.position_ids[:, -1:] + 1,
            None,
        )
        return torch.cat([column, self._more(following, cache, ended, left - 1, eos)], dim=1)
