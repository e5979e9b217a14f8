"""Each id is written as often as it gives tokens, then masked_scatter; the tower runs in no_grad once it is frozen."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbedding(nn.Module):
    """Reshapes, and multiplies; the table is resized on every grid, which leaves its own as it is."""

    def __init__(self, image_size: int, patch_size: int, embed_dim: int, channels: int = 3) -> None:
        super().__init__()
        side = image_size // patch_size
        self.proj = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.randn(side * side, embed_dim).mul_(0.01))

    def forward(self, images: Tensor) -> Tensor:
        """One product of all patches."""
        m, c, h, w = images.shape
        p = self.proj.weight.shape[-1]
        for side in (w, h):
            if side % p != 0:
                raise ValueError(f"{side} pixels in patches of {p}")
        cells = images.reshape(m, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(m, -1, c * p * p)
        table = self.position_embedding
        wide = table if table.dtype == torch.float64 else table.float()
        square = wide.T.reshape(1, table.size(1), round(len(table) ** 0.5), -1)
        resized = F.interpolate(square, size=(h // p, w // p), mode="bicubic", align_corners=False)
        return F.linear(cells, self.proj.weight.reshape(-1, c * p * p), self.proj.bias) + resized.flatten(2).mT.to(
            table
        )


class Projector(nn.Module):
    """By torch.addmm's kin."""

    def __init__(self, vision_dim: int, d_model: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, d_model)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(d_model, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """One after the other."""
        for layer in (self.fc1, self.activation, self.fc2):
            tokens = layer(tokens)
        return tokens


class VisionLanguageModel(nn.Module):
    """Lists of ids."""

    stage: Tensor

    def __init__(
        self, vision: nn.Module, decoder: Decoder, vision_dim: int, image_token_id: int, pad_token_id: int = 0
    ) -> None:
        super().__init__()
        self.decoder, self.projector, self.vision = decoder, Projector(vision_dim, decoder.d_model), vision
        self.image_token_id, self.pad_token_id = image_token_id, pad_token_id
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64), persistent=False)

    def merge(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
    ) -> Merged:
        """Ids, labels and what is an image, as lists."""
        shown = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool().tolist()
        ids = input_ids.tolist()
        learnt = [[-100] * len(row) for row in ids] if labels is None else labels.tolist()
        count = sum(
            s and i == self.image_token_id
            for row, seen in zip(ids, shown, strict=True)
            for i, s in zip(row, seen, strict=True)
        )
        given = 0 if images is None else images.size(0)
        if given != count:
            raise ValueError(f"placeholders and images: {count} and {given}")
        tokens = None
        if images is not None and given:
            first = next(self.vision.parameters(), images)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not int(self.stage)):
                tokens = self.vision(images.to(first.dtype))
            tokens = self.projector(tokens.to(self.projector.fc1.bias.dtype))
        per = 0 if tokens is None else tokens.size(1)
        rows = []
        for row, seen, marks in zip(ids, shown, learnt, strict=True):
            wide = [
                [(0, -100, True)] * per if one == self.image_token_id else [(one, mark, False)]
                for one, show, mark in zip(row, seen, marks, strict=True)
                if show
            ]
            rows.append(list(chain.from_iterable(wide)))
        width = max(map(len, rows))
        blank = (self.decoder.embed.num_embeddings - 1, -100, False)
        full, masks, places = [], [], []
        for one in rows:
            gap = width - len(one)
            if padding_side == "left":
                full.append([blank] * gap + one)
                masks.append([False] * gap + [True] * len(one))
                places.append([0] * gap + list(range(len(one))))
            else:
                full.append(one + [blank] * gap)
                masks.append([True] * len(one) + [False] * gap)
                places.append(list(range(len(one))) + [0] * gap)
        device = input_ids.device
        table = torch.tensor([[cell[0] for cell in one] for one in full], device=device)
        pictures = torch.tensor([[cell[2] for cell in one] for one in full], device=device)
        embeds = self.decoder.embed(table)
        if tokens is not None:
            embeds = embeds.masked_scatter(pictures[..., None].expand_as(embeds), tokens.to(embeds.dtype))
        targets = torch.tensor([[cell[1] for cell in one] for one in full], device=device)
        return Merged(
            embeds,
            torch.tensor(masks, device=device),
            torch.tensor(places, device=device),
            None if labels is None else targets,
        )

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss by nll_loss over flat rows."""
        merged = self.merge(input_ids, images, attention_mask, labels)
        logits = self.decoder(*merged[:3])[0]
        if merged.labels is None:
            return logits, None
        targets = merged.labels.clone()
        targets[:, 0] = -100
        targets = targets.flatten()
        kind = torch.promote_types(logits.dtype, torch.float32)
        chances = logits.roll(1, dims=1).flatten(0, 1).to(kind).log_softmax(-1)
        total = F.nll_loss(chances, targets, reduction="sum")
        return logits, total / targets.ne(-100).sum().clamp_min(1)

    def set_stage(self, stage: int) -> None:
        """A frozen decoder sleeps too, until it is thawed."""
        if not 1 <= stage <= 2:
            raise ValueError(f"stage {stage}")
        for part in (self.vision, self.decoder, self.projector):
            part.requires_grad_(part is self.projector or (stage == 2 and part is self.decoder))
        for parameter in self.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
        self.stage.fill_(stage)
        self.vision.eval()
        if stage == 1:
            self.decoder.eval()

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """As the stage says."""
        super().train(mode)
        if hasattr(self, "stage") and int(self.stage):
            self.vision.eval()
            if int(self.stage) == 1:
                self.decoder.eval()
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
        """Rows that have ended are fed the pad id."""
        pad = self.pad_token_id
        merged = self.merge(input_ids, images, attention_mask, None, "left")
        lengths = merged.attention_mask.sum(1)
        mask = merged.attention_mask
        logits, cache = self.decoder(merged.inputs_embeds, mask, merged.position_ids, None)
        new = logits[:, -1:].argmax(-1)
        while new.size(1) < max_new_tokens:
            over = torch.zeros_like(lengths, dtype=torch.bool) if eos_token_id is None else (new == eos_token_id).any(1)
            if over.all():
                break
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            fed = self.decoder.embed(new[:, -1:])
            logits, cache = self.decoder(fed, mask, (lengths + new.size(1) - 1)[:, None], cache)
            new = torch.cat((new, logits[:, -1:].argmax(-1).masked_fill(over[:, None], pad)), dim=1)
        return F.pad(new, (0, max_new_tokens - new.size(1)), value=pad)
