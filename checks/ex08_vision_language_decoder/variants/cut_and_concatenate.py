"""As LLaVA does it: each row is cut at its placeholders and concatenated, and padded at the end; the loss by gather."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbedding(nn.Module):
    """Unfolds, and multiplies."""

    def __init__(self, image_size: int, patch_size: int, embed_dim: int, channels: int = 3) -> None:
        super().__init__()
        self.g, self.p = image_size // patch_size, patch_size
        self.proj = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(self.g * self.g, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Patches by F.unfold."""
        p, (height, width) = self.p, images.shape[2:]
        if height % p or width % p:
            raise ValueError(f"{height} × {width} is not divisible by {p}")
        flat = F.unfold(images, p, stride=p).transpose(1, 2)
        tokens = F.linear(flat, self.proj.weight.flatten(1), self.proj.bias)
        table: Tensor = self.position_embedding
        if (height // p, width // p) != (self.g, self.g):
            square = table.double().reshape(1, self.g, self.g, -1).permute(0, 3, 1, 2)
            square = F.interpolate(square, (height // p, width // p), mode="bicubic")
            table = square.permute(0, 2, 3, 1).reshape(-1, table.size(1)).to(table)
        return tokens + table


class VisionLanguageModel(nn.Module):
    """Row by row in Python."""

    def __init__(
        self, vision: nn.Module, decoder: Decoder, vision_dim: int, image_token_id: int, pad_token_id: int = 0
    ) -> None:
        super().__init__()
        self.vision, self.decoder = vision, decoder
        self.projector = Projector(vision_dim, decoder.d_model)
        self.image_token_id, self.pad_token_id = image_token_id, pad_token_id
        self.stage = 0

    def merge(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
    ) -> Merged:
        """Cuts and concatenates."""
        visible = [slice(None)] * len(input_ids) if attention_mask is None else attention_mask.bool()
        ids = [row[seen] for row, seen in zip(input_ids, visible, strict=True)]
        wanted = sum(int((row == self.image_token_id).sum()) for row in ids)
        have = 0 if images is None else images.shape[0]
        if have != wanted:
            raise ValueError(f"{have} images for {wanted} placeholders")
        features = iter(self.encode(images)) if images is not None and have else iter(())
        rows, targets = [], []
        for number, row in enumerate(ids):
            learnt = None if labels is None else labels[number][visible[number]]
            parts, marks, start = [], [], 0
            for place in [*(row == self.image_token_id).nonzero()[:, 0].tolist(), len(row)]:
                parts.append(self.decoder.embed(row[start:place]))
                if learnt is not None:
                    marks.append(learnt[start:place])
                if place < len(row):
                    parts.append(next(features))
                    marks.append(row.new_full((len(parts[-1]),), -100))
                start = place + 1
            rows.append(torch.cat(parts))
            targets.append(torch.cat(marks) if learnt is not None else row[:0])
        longest = max(map(len, rows))
        embeds, masks, positions, all_targets = [], [], [], []
        for one, target in zip(rows, targets, strict=True):
            room = longest - len(one)
            ends = (0, room) if padding_side == "right" else (room, 0)
            embeds.append(F.pad(one, (0, 0, *ends)))
            masks.append(F.pad(torch.ones(len(one), dtype=torch.bool, device=one.device), ends))
            positions.append(F.pad(torch.arange(len(one), device=one.device), ends))
            all_targets.append(F.pad(target, ends, value=-100))
        merged_labels = None if labels is None else torch.stack(all_targets)
        return Merged(torch.stack(embeds), torch.stack(masks), torch.stack(positions), merged_labels)

    def encode(self, images: Tensor) -> Tensor:
        """Image tokens."""
        for parameter in self.vision.parameters():
            images = images.to(parameter.dtype)
            break
        tokens = self.vision(images)
        return self.projector(tokens.to(self.projector.fc2.weight.dtype)).to(self.decoder.embed.weight.dtype)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss by gather."""
        embeds, mask, positions, targets = self.merge(input_ids, images, attention_mask, labels)
        logits = self.decoder(embeds, mask, positions)[0]
        if targets is None:
            return logits, None
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        counts = targets[:, 1:] != -100
        chances = logits[:, :-1].to(kind).log_softmax(-1)
        picked = chances.gather(2, targets[:, 1:].clamp(min=0)[..., None])[..., 0]
        return logits, -(picked * counts).sum() / max(int(counts.sum()), 1)

    def set_stage(self, stage: int) -> None:
        """Sets each flag."""
        if stage != 1 and stage != 2:
            raise ValueError(stage)
        self.stage = stage
        for name, parameter in self.named_parameters():
            parameter.requires_grad = name.startswith("projector.") or (stage == 2 and name.startswith("decoder."))
            if not parameter.requires_grad:
                parameter.grad = None
        self.vision.train(False)

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """All but the tower."""
        for name, part in self.named_children():
            part.train(mode and not (self.stage and name == "vision"))
        self.training = mode
        return self

    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """Under inference_mode, but for the result."""
        with torch.inference_mode():
            embeds, mask, positions, _ = self.merge(input_ids, images, attention_mask, None, "left")
            logits, cache = self.decoder(embeds, mask, positions)
            best = logits[:, -1].argmax(-1)
            ended = torch.zeros_like(best, dtype=torch.bool)
            columns = []
            while True:
                columns.append(torch.where(ended, self.pad_token_id, best).tolist())
                ended = ended | (best == (-1 if eos_token_id is None else eos_token_id))
                if len(columns) == max_new_tokens or ended.all():
                    break
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                positions = positions.amax(1, keepdim=True) + 1
                logits, cache = self.decoder(self.decoder.embed(best[:, None]), mask, positions, cache)
                best = logits[:, 0].argmax(-1)
        columns += [[self.pad_token_id] * len(input_ids)] * (max_new_tokens - len(columns))
        return torch.tensor(columns, device=input_ids.device).T.contiguous()
