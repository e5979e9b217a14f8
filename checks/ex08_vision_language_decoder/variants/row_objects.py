"""Rows are objects; prompts stay padded on the right while decoding, and rows that have ended leave the batch."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class _Row:
    """The tokens of one row: an id each, or None for an image token."""

    ids: list[int | None] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)

    def add(self, one: int | None, label: int, times: int = 1) -> None:
        """Appends."""
        self.ids += [one] * times
        self.labels += [label] * times


class VisionLanguageModel(nn.Module):
    """Objects."""

    def __init__(
        self, vision: nn.Module, decoder: Decoder, vision_dim: int, image_token_id: int, pad_token_id: int = 0
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = Projector(vision_dim, decoder.d_model)
        self.decoder = decoder
        self.image = image_token_id
        self.pad = pad_token_id
        self.sleeping: list[nn.Module] = []

    def merge(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
    ) -> Merged:
        """Counts first, then reads the images, then makes the rows."""
        hidden = torch.zeros_like(input_ids) if attention_mask is None else attention_mask.eq(0)
        clean = input_ids.masked_fill(hidden.bool(), self.image - 1)
        counts = [row.count(self.image) for row in clean.tolist()]
        given = len(images) if images is not None else 0
        if sum(counts) != given:
            raise ValueError(f"{sum(counts)} != {given}")
        tokens, per = self.tokens(images) if images is not None and given else (None, 0)
        rows = []
        lines = zip(
            input_ids.tolist(), hidden.tolist(), (input_ids if labels is None else labels).tolist(), strict=True
        )
        for ids, gone, marks in lines:
            row = _Row()
            for one, skip, mark in zip(ids, gone, marks, strict=True):
                if not skip and one == self.image:
                    row.add(None, -100, per)
                elif not skip:
                    row.add(one, mark)
            rows.append(row)
        return self.packed(rows, tokens, padding_side, labels is not None)

    def packed(self, rows: list[_Row], tokens: Tensor | None, side: str, learnt: bool) -> Merged:
        """Rows as tensors."""
        device = self.decoder.embed.weight.device
        flat = [one for row in rows for one in row.ids]
        text = self.decoder.embed(
            torch.tensor([one for one in flat if one is not None], dtype=torch.long, device=device)
        )
        source = text if tokens is None else torch.cat([text, tokens])
        text_at, image_at, index = 0, len(text), []
        for one in flat:
            index.append(image_at if one is None else text_at)
            image_at, text_at = image_at + (one is None), text_at + (one is not None)
        parts = source[torch.tensor(index, device=device)].split([len(row.ids) for row in rows])
        width = max(len(part) for part in parts)

        def pad(values: list[Tensor], fill: int) -> Tensor:
            filled = []
            for value in values:
                rest = value.new_full((width - len(value), *value.shape[1:]), fill)
                filled.append(torch.cat([value, rest] if side == "right" else [rest, value]))
            return torch.stack(filled)

        counted = [torch.arange(len(part), device=device) for part in parts]
        labels = pad([torch.tensor(row.labels, device=device) for row in rows], -100) if learnt else None
        return Merged(pad(list(parts), 1), pad([c >= 0 for c in counted], 0), pad(counted, 0), labels)

    def tokens(self, images: Tensor) -> tuple[Tensor, int]:
        """Image tokens [M·T, D], and T."""
        dtypes = [parameter.dtype for parameter in self.vision.parameters()][:1]
        seen = self.vision(images.to(dtypes[0]) if dtypes else images)
        seen = self.projector(seen.to(self.projector.fc1.weight.dtype)).to(self.decoder.embed.weight.dtype)
        return seen.reshape(-1, seen.size(-1)), seen.size(1)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss by cross_entropy over the class dimension."""
        merged = self.merge(input_ids, images, attention_mask, labels)
        logits, _ = self.decoder(merged.inputs_embeds, merged.attention_mask, merged.position_ids)
        if merged.labels is None:
            return logits, None
        scores = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(scores[:, :-1].transpose(1, 2), merged.labels[:, 1:], reduction="none")
        count = (merged.labels[:, 1:] >= 0).sum()
        return logits, losses.sum() / (count if count else 1)

    def set_stage(self, stage: int) -> None:
        """Notes what sleeps."""
        match stage:
            case 1:
                asleep: list[nn.Module] = [self.vision, self.decoder]
            case 2:
                asleep = [self.vision]
            case _:
                raise ValueError(f"stage {stage!r}: 1 and 2 are the stages")
        self.sleeping = [self.vision]
        for part in self.children():
            part.requires_grad_(part not in asleep)
            if part in asleep:
                part.zero_grad()
        self.vision.eval()

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """What sleeps stays asleep."""
        super().train(mode)
        for part in self.sleeping:
            part.eval()
        return self

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """Padding on the right stays hidden between prompt and new tokens."""
        x, mask, positions, _ = self.merge(input_ids, images, attention_mask)
        rows = [_Row() for _ in range(len(x))]
        alive = list(range(len(x)))
        lengths = mask.sum(1)
        logits, cache = self.decoder(x, mask, positions)
        last = logits[torch.arange(len(x)), lengths - 1]
        for step in range(max_new_tokens):
            best = last.argmax(-1).tolist()
            for number, one in zip(alive, best, strict=True):
                rows[number].new.append(one)
            keep = [place for place, one in enumerate(best) if one != eos_token_id]
            alive = [alive[place] for place in keep]
            if not keep or step == max_new_tokens - 1:
                break
            pick = torch.tensor(keep, device=mask.device)
            mask = torch.cat([mask[pick], mask.new_ones(len(keep), 1)], dim=1)
            lengths, cache = lengths[pick], [(keys[pick], values[pick]) for keys, values in cache]
            fed = torch.tensor([best[place] for place in keep], device=mask.device)
            logits, cache = self.decoder(self.decoder.embed(fed)[:, None], mask, (lengths + step)[:, None], cache)
            last = logits[:, 0]
        done = [row.new + [self.pad] * (max_new_tokens - len(row.new)) for row in rows]
        return torch.tensor(done, device=input_ids.device)
