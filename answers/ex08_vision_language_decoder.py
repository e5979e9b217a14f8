"""The answer to ex08, Vision tokens in a language decoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]
IGNORED = -100  # the label of what is not learnt


class PatchEmbedding(nn.Module):
    """Images as tokens, one for each patch, with position embeddings.

    Args:
        image_size: side of the images that the position embeddings are made for.
        patch_size: side of a patch, P.
        embed_dim: width of a token.
        channels: C.

    Attributes:
        proj: nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size).
        position_embedding: nn.Parameter [G·G, embed_dim], row by row; G = image_size // patch_size.
    """

    def __init__(self, image_size: int, patch_size: int, embed_dim: int, channels: int = 3) -> None:
        super().__init__()
        self.grid = image_size // patch_size
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(self.grid**2, embed_dim))  # [G·G, embed_dim]

    def forward(self, images: Tensor) -> Tensor:
        """Cuts images into patches.

        Args:
            images: [M, C, H, W].

        Returns:
            [M, (H / P)·(W / P), embed_dim].

        Raises:
            ValueError: H or W is no multiple of P; the message has that length and P.
        """
        for side in images.shape[-2:]:
            if side % self.patch_size:
                raise ValueError(f"a side of {side} is no multiple of the patch size {self.patch_size}")
        patches = self.proj(images)  # [M, embed_dim, H/P, W/P]
        return patches.flatten(2).mT + self._positions(*patches.shape[2:])  # [M, (H/P)·(W/P), embed_dim]

    def _positions(self, rows: int, columns: int) -> Tensor:
        table = self.position_embedding
        if (rows, columns) == (self.grid, self.grid):
            return table
        # bfloat16 would round the weights of the interpolation too.
        square = table.to(_at_least_float32(table)).unflatten(0, (self.grid, self.grid)).permute(2, 0, 1)
        resized = F.interpolate(square[None], size=(rows, columns), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).mT.to(table.dtype)  # [rows·columns, embed_dim]


class Projector(nn.Module):
    """Two layers from the tower's width to the decoder's.

    Args:
        vision_dim: width of the tower's tokens.
        d_model: width of the decoder's.

    Attributes:
        fc1: nn.Linear(vision_dim, d_model); fc2: nn.Linear(d_model, d_model).
    """

    def __init__(self, vision_dim: int, d_model: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, d_model)
        self.fc2 = nn.Linear(d_model, d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., vision_dim] -> [..., d_model], with an exact GELU in between."""
        return self.fc2(F.gelu(self.fc1(tokens)))  # [..., d_model]


# Given; no need to change.
class Merged(NamedTuple):
    """What a decoder reads: inputs_embeds [B, S, D], attention_mask bool [B, S], position_ids int64 [B, S]; and the
    labels int64 [B, S], or None.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


# Given; no need to change.
class DecoderLayer(nn.Module):
    """Causal self-attention with rotary positions, then an MLP, each behind a norm and added to its input."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(
        self, x: Tensor, visible: Tensor, rotation: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, L, D], visible bool [B, 1, L, P + L] -> [B, L, D], and all keys and values [B, H, P + L, Dh]."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        (q, k), v = rotate(heads[:2], *rotation), heads[2]  # each [B, H, L, Dh]
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # [B, H, P + L, Dh]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # [B, H, L, Dh]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), (k, v)


# Given; no need to change.
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the two halves of x as pairs: x [..., B, H, L, Dh], cos and sin [B, 1, L, Dh]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# Given; no need to change.
class Decoder(nn.Module):
    """A small causal decoder with rotary positions. To be used are its two attributes, and the decoder as a function.

    Args:
        vocab_size, d_model, num_layers, num_heads: sizes; d_model / num_heads is even.

    Attributes:
        embed: nn.Embedding(vocab_size, d_model), which gives the input of a token.
        d_model: as given.
    """

    def __init__(self, vocab_size: int, d_model: int = 16, num_layers: int = 2, num_heads: int = 2) -> None:
        super().__init__()
        self.d_model, self.num_heads = d_model, num_heads
        self.embed = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(DecoderLayer(d_model, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """The logits of what follows each token. Each token sees itself, and the visible ones before it.

        Args:
            inputs_embeds: [B, L, D], the new tokens.
            attention_mask: bool [B, P + L], True for the visible ones of the P tokens in the cache and the L new ones.
            position_ids: int64 [B, L], those of the new tokens.
            cache: what the last call returned; None: P is 0.

        Returns:
            logits [B, L, V]; the cache of all P + L tokens, a new list of (keys, values), batch first.
        """
        length, total = inputs_embeds.size(1), attention_mask.size(1)
        before = torch.ones(length, total, dtype=torch.bool, device=inputs_embeds.device).tril(total - length)
        itself = before.triu(total - length)
        visible = (before & attention_mask.bool()[:, None] | itself)[:, None]  # [B, 1, L, P + L]
        half = self.d_model // self.num_heads // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=inputs_embeds.device) / half)
        angles = (position_ids[..., None] * frequencies.repeat(2))[:, None]  # [B, 1, L, Dh]
        rotation = angles.cos().to(inputs_embeds.dtype), angles.sin().to(inputs_embeds.dtype)
        x, new = inputs_embeds, []
        for number, layer in enumerate(self.layers):
            x, held = layer(x, visible, rotation, None if cache is None else cache[number])
            new.append(held)
        return self.head(self.norm(x)), new


class VisionLanguageModel(nn.Module):
    """A decoder that reads images between its tokens.

    Args:
        vision: the tower, any module [M, C, H, W] -> [M, T, vision_dim].
        decoder: the language model.
        vision_dim: width of the tower's tokens.
        image_token_id: the placeholder's id, in the vocabulary or not.
        pad_token_id: what `generate` returns after a row's end.

    Attributes:
        vision, decoder: as given.
        projector: Projector(vision_dim, decoder.d_model).
    """

    def __init__(
        self, vision: nn.Module, decoder: Decoder, vision_dim: int, image_token_id: int, pad_token_id: int = 0
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = Projector(vision_dim, decoder.d_model)
        self.decoder = decoder
        self.image_token_id = image_token_id
        self.pad_token_id = pad_token_id
        self._staged = False

    def merge(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str = "right",
    ) -> Merged:
        """Puts the images' tokens in the places of the visible placeholders.

        Args:
            input_ids: int64 [B, L].
            images: [M, C, H, W], in the order of the placeholders.
            attention_mask: 0/1 [B, L] of any dtype; None: all ones.
            labels: int64 [B, L], -100 for what is not learnt.
            padding_side: "right" or "left": where padding stands in what is returned.

        Returns:
            What the decoder reads; without labels its labels are None.

        Raises:
            ValueError: visible placeholders and images differ in number; the message has both numbers.
        """
        visible = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        is_image = visible & (input_ids == self.image_token_id)  # [B, L]
        wanted, count = int(is_image.sum()), 0 if images is None else len(images)
        if wanted != count:
            raise ValueError(f"{wanted} visible placeholders, but {count} images")
        tokens = self._image_tokens(images) if images is not None and count else None  # [M, T, D]

        # Each id is repeated as often as it gives tokens: 0, 1 or T times. N tokens in all, row after row.
        repeats = visible.long() if tokens is None else visible + is_image * (tokens.size(1) - 1)  # [B, L]
        source = torch.repeat_interleave(repeats.flatten())  # [N], places in the flat ids
        from_image = is_image.flatten()[source]  # [N]
        embeds = self.decoder.embed(input_ids.flatten()[source].masked_fill(from_image, 0))  # [N, D]
        if tokens is not None:
            embeds = embeds.masked_scatter(from_image[:, None], tokens)

        lengths = repeats.sum(dim=1, keepdim=True)  # [B, 1]
        longest = int(lengths.max())
        columns = torch.arange(longest, device=input_ids.device)
        mask = columns < lengths if padding_side == "right" else columns >= longest - lengths  # [B, S]
        inputs_embeds = embeds.new_zeros(*mask.shape, embeds.size(-1)).masked_scatter(mask[..., None], embeds)
        if labels is not None:
            learnt = labels.flatten()[source].masked_fill(from_image, IGNORED)  # [N]
            labels = labels.new_full(mask.shape, IGNORED).masked_scatter(mask, learnt)  # [B, S]
        return Merged(inputs_embeds, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), labels)

    def _image_tokens(self, images: Tensor) -> Tensor:
        """[M, C, H, W] -> [M, T, D] in the embedding's dtype."""
        first = next(self.vision.parameters(), None)
        tokens = self.vision(images if first is None else images.to(first.dtype))  # [M, T, vision_dim]
        return self.projector(tokens.to(self.projector.fc1.weight.dtype)).to(self.decoder.embed.weight.dtype)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The logits of what follows each token, and the loss.

        Args:
            input_ids, images, attention_mask, labels: as for merge.

        Returns:
            logits [B, S, V], padded on the right; the loss [], or None without labels.
        """
        merged = self.merge(input_ids, images, attention_mask, labels)
        logits, _ = self.decoder(merged.inputs_embeds, merged.attention_mask, merged.position_ids)  # [B, S, V]
        if merged.labels is None:
            return logits, None
        before = logits[:, :-1].flatten(0, 1).to(_at_least_float32(logits))  # [B·(S - 1), V]
        targets = merged.labels[:, 1:].flatten()  # [B·(S - 1)]
        total = F.cross_entropy(before, targets, ignore_index=IGNORED, reduction="sum")
        return logits, total / (targets != IGNORED).sum().clamp(min=1)

    def set_stage(self, stage: int) -> None:
        """Freezes and thaws the parts for a stage of training.

        Args:
            stage: 1: the projector trains; 2: projector and decoder do.

        Raises:
            ValueError: the stage is neither 1 nor 2.
        """
        if stage not in (1, 2):
            raise ValueError(f"stage {stage} is neither 1 nor 2")
        for part, trains in ((self.vision, False), (self.projector, True), (self.decoder, stage == 2)):
            part.requires_grad_(trains)
            if not trains:
                part.zero_grad()
        self._staged = True
        self.vision.eval()

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """As of any module; but once a stage is set, the tower stays in eval."""
        super().train(mode)
        if self._staged:
            self.vision.eval()
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
        """The greedy continuation of each row.

        Args:
            input_ids, images, attention_mask: as for merge.
            max_new_tokens: how many tokens each row gets.
            eos_token_id: ends a row, which then gets pad_token_id.

        Returns:
            int64 [B, max_new_tokens], the new tokens alone.
        """
        # With padding on the left the next token of every row belongs into the same column.
        embeds, mask, positions, _ = self.merge(input_ids, images, attention_mask, padding_side="left")
        running = torch.ones_like(mask[:, 0])  # [B]
        new = input_ids.new_full((len(input_ids), max_new_tokens), self.pad_token_id)
        cache: Cache | None = None
        for step in range(max_new_tokens):
            logits, cache = self.decoder(embeds, mask, positions, cache)
            best = logits[:, -1].argmax(dim=-1)  # [B]
            new[:, step] = best.where(running, new[:, step])
            if eos_token_id is not None:
                running = running & (best != eos_token_id)
                if not running.any():
                    break
            embeds = self.decoder.embed(best)[:, None]  # [B, 1, D]
            mask = F.pad(mask, (0, 1), value=True)
            positions = positions[:, -1:] + 1
        return new


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def test_vision_language() -> None:
    """Your own test of all three classes: passes on right code, fails on each slip listed above."""
    torch.manual_seed(0)
    _patches_have_positions()
    model = VisionLanguageModel(nn.Flatten(2), _Placed(13), 4, image_token_id=-200).double()
    # Two tokens an image; padding on the right of one row, on the left of the other.
    ids = torch.tensor([[5, -200, 3, 1, 1, 1, 1], [1, 7, 8, -200, 9, 6, 4]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]])
    images = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    rows, learnt = [ids[0, :3], ids[1, 1:]], [[5, -100, -100, 3], [7, 8, -100, -100, 9, 6, 4]]

    tokens = model.projector(images.flatten(2))  # [M, T, D]
    first, last = model.decoder.embed(torch.tensor([5, 3])), model.decoder.embed(torch.tensor([7, 8, 9, 6, 4]))
    embeds = [torch.cat([first[:1], tokens[0], first[1:]]), torch.cat([last[:2], tokens[1], last[2:]])]
    for side in ("right", "left"):
        merged = model.merge(ids, images, mask, ids, padding_side=side)
        for row in (0, 1):
            seen = merged.attention_mask[row]
            assert seen.sum() == len(learnt[row]), "not the row's tokens alone are visible"
            torch.testing.assert_close(merged.inputs_embeds[row, seen], embeds[row])
            assert merged.position_ids[row, seen].tolist() == list(range(len(learnt[row]))), "positions"
            assert merged.labels is not None and merged.labels[row, seen].tolist() == learnt[row], "labels"

    logits, loss = model(ids, images, mask, ids)
    alone = [model(rows[row][None], images[row : row + 1])[0][0] for row in (0, 1)]
    torch.testing.assert_close(logits[0, :4], alone[0])
    torch.testing.assert_close(logits[1], alone[1])
    before = torch.cat([alone[0][:-1], alone[1][:-1]])
    mean = F.cross_entropy(before, torch.tensor(learnt[0][1:] + learnt[1][1:]))
    torch.testing.assert_close(loss, mean, check_dtype=False)
    _stages_train_their_parts()

    by_hand = torch.tensor([_again(model, rows[row], images[row : row + 1]) for row in (0, 1)])
    assert torch.equal(model.generate(ids, images, mask, max_new_tokens=8), by_hand), "generate differs from forward"
    try:
        model.merge(torch.tensor([[1, 2]]), images)
    except ValueError:
        return
    raise AssertionError("images without a placeholder are accepted")


class _Placed(Decoder):
    """Adds a vector for each position, so that generation depends on more than distances."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.places = nn.Embedding(32, self.d_model)
        for parameter in self.parameters():
            if parameter.dim() == 2:  # with large biases it would say one token again and again
                nn.init.normal_(parameter)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        placed = inputs_embeds + self.places(position_ids.clamp(0, 31))
        return super().forward(placed, attention_mask, position_ids, cache)


def _patches_have_positions() -> None:
    tower = PatchEmbedding(4, 2, 3, channels=1)
    table = torch.randn(4, 3)
    with torch.no_grad():
        tower.proj.weight.zero_()
        tower.proj.bias.zero_()  # type: ignore[union-attr]
        tower.position_embedding.copy_(table)
    assert torch.equal(tower(torch.ones(1, 1, 4, 4))[0], table), "positions are not row by row"
    grid = table.T.unflatten(1, (2, 2))[None]
    wide = F.interpolate(grid, size=(1, 3), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(tower(torch.ones(1, 1, 2, 6))[0], wide)


def _stages_train_their_parts() -> None:
    tower, ids = PatchEmbedding(4, 2, 3, channels=1), torch.tensor([[1, -200, 2, 3]])
    model = VisionLanguageModel(tower, Decoder(5), 3, image_token_id=-200)
    parts = {"vision": model.vision, "projector": model.projector, "decoder": model.decoder}
    for stage, trained in ((1, ["projector"]), (2, ["projector", "decoder"])):
        model.zero_grad()
        model.set_stage(stage)
        loss = model(ids, torch.ones(1, 1, 4, 4), None, ids)[1]
        assert loss is not None
        loss.backward()
        for name, part in parts.items():
            gradients = [parameter.grad is not None for parameter in part.parameters()]
            assert all(gradients) if name in trained else not any(gradients), f"stage {stage}: {name}"


def _again(model: VisionLanguageModel, row: Tensor, images: Tensor) -> list[int]:
    """Eight new tokens of one row, which is run as a whole for each."""
    ids = row[None]
    for _ in range(8):
        ids = torch.cat([ids, model(ids, images)[0][:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, -8:].tolist()
