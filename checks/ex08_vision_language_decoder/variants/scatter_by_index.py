"""New places by a cumulative sum, then index_put; the tower sleeps by a hook on its own train()."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VisionLanguageModel(nn.Module):
    """Index arithmetic."""

    def __init__(
        self, vision: nn.Module, decoder: Decoder, vision_dim: int, image_token_id: int, pad_token_id: int = 0
    ) -> None:
        super().__init__()
        self.vision = vision
        self.decoder = decoder
        self.projector = Projector(vision_dim, decoder.d_model)
        self.ids = {"image": image_token_id, "pad": pad_token_id}

    def merge(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
    ) -> Merged:
        """Writes text and images to their places."""
        seen = torch.full(input_ids.shape, True, device=input_ids.device)
        if attention_mask is not None:
            seen = attention_mask > 0
        pictures = seen & (input_ids == self.ids["image"])
        n, m = int(pictures.sum()), 0 if images is None else len(images)
        if n != m:
            raise ValueError(f"images: got {m}, expected {n}")
        weight = self.decoder.embed.weight
        tokens = weight.new_zeros(0, 1, weight.size(1))
        if images is not None and m:
            kinds = [parameter.dtype for parameter in self.vision.parameters()]
            raw = self.vision(images.to(kinds[0]) if kinds else images)
            tokens = self.projector(raw.to(self.projector.fc1.weight)).to(weight)
        t = tokens.size(1)
        sizes = seen.long() + pictures.long() * (t - 1)
        starts = sizes.cumsum(1) - sizes
        totals = sizes.sum(1)
        width = int(totals.max())
        if padding_side == "left":
            starts = starts + (width - totals)[:, None]
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
        text = seen & ~pictures
        embeds = weight.new_full((len(input_ids), width, weight.size(1)), 7.0)
        embeds = embeds.index_put((rows[text], starts[text]), self.decoder.embed(input_ids[text]))
        targets = torch.full((len(input_ids), width), -100, device=input_ids.device)
        if labels is not None:
            targets[rows[text], starts[text]] = labels[text]
        mask = torch.zeros_like(targets, dtype=torch.bool)
        mask[rows[text], starts[text]] = True
        if m:
            places = starts[pictures][:, None] + torch.arange(t, device=input_ids.device)
            embeds = embeds.index_put((rows[pictures][:, None].expand(-1, t), places), tokens)
            mask[rows[pictures][:, None], places] = True
        positions = torch.arange(width, device=input_ids.device).repeat(len(input_ids), 1)
        if padding_side == "left":
            positions = positions - (width - totals)[:, None]
        return Merged(embeds, mask, positions, None if labels is None else targets)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss over the labels that count alone, in float32 whatever the decoder's dtype."""
        merged = self.merge(input_ids, images, attention_mask, labels)
        logits, _ = self.decoder(
            position_ids=merged.position_ids, inputs_embeds=merged.inputs_embeds, attention_mask=merged.attention_mask
        )
        if labels is None or merged.labels is None:
            return logits, None
        shifted = F.pad(merged.labels[:, 1:], (0, 1), value=-100)
        counts = shifted != -100
        if not counts.any():
            return logits, logits.float().sum() * 0
        return logits, F.cross_entropy(logits[counts].float(), shifted[counts])

    def set_stage(self, stage: int) -> None:
        """The tower's train() is replaced by eval()."""
        frozen = {1: [self.vision, self.decoder], 2: [self.vision]}
        if stage not in frozen:
            raise ValueError(f"no stage {stage}")
        self.requires_grad_(True)
        for part in frozen[stage]:
            part.requires_grad_(False).zero_grad(set_to_none=True)
        self.vision.eval()
        tower = self.vision
        object.__setattr__(tower, "train", lambda mode=True: nn.Module.train(tower, False))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """The whole mask is made beforehand, and shown column by column."""
        x, prompt, positions, _ = self.merge(input_ids, images, attention_mask, padding_side="left")
        width = prompt.size(1)
        whole = F.pad(prompt, (0, max_new_tokens), value=True)
        result = torch.full((len(x), max_new_tokens), self.ids["pad"], device=input_ids.device)
        alive = set(range(len(x)))
        cache: Cache | None = None
        for step in range(max_new_tokens):
            logits, cache = self.decoder(x, whole[:, : width + step], positions, cache)
            best = torch.max(logits[:, -1], dim=-1).indices
            for row in sorted(alive):
                result[row, step] = best[row]
                if int(best[row]) == eos_token_id:
                    alive.remove(row)
            if not alive:
                return result
            x = self.decoder.embed(best.unsqueeze(1))
            positions = (prompt.sum(1, keepdim=True)) + step
        return result
