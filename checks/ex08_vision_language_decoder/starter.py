"""ex08: Vision tokens in a language decoder

A vision tower turns an image into tokens. A projector brings them to the width of a language
decoder, where they stand in place of a placeholder: so LLaVA and most open models since read
images. The work is the bookkeeping: rows of many lengths, labels, positions, stages, a cache.

Steps
1. Image tokens in the text (40 min): 8.3
2. Labels, loss and padding (30 min): 8.4, 8.5
3. Patches (25 min): 8.1, 8.2
4. Stages (15 min): 8.6
5. Generation, and any dtype (45 min): 8.7, 8.8, 8.9
6. Your own test, and style (60 min): 8.10, 8.11

Requirements
8.1 (correctness) Cut images into patches: `PatchEmbedding` maps each P × P patch of an image by
    proj's weight and bias. Patches do not overlap and come row by row.
    - Images may be strided, wide or tall, and have any number of channels.
    - A height or width that is no multiple of P raises ValueError with that length and P.
8.2 (correctness) Take images of other sizes: a G × G grid of patches gets the position embeddings
    as they are, bit for bit. Any other grid, even one of as many patches, has them resized by
    `F.interpolate(mode="bicubic", align_corners=False)`, computed in float32 or better.
    - Gradients reach the table. The next call uses a changed one.
8.3 (correctness) Put image tokens into the text: `merge` replaces each visible placeholder by the
    T projected tokens of its image. Every other visible id becomes one token.
    - Images come in the order of the placeholders, row after row.
    - A row has any number of placeholders: side by side, first, last, nothing else, or none.
    - image_token_id need not be in the vocabulary (LLaVA: -200). The mask has any 0/1 dtype.
    - Where visible placeholders and images differ in number, ValueError comes with both numbers,
      before tower or decoder run. Inputs are never written to, not even to be restored.
8.4 (correctness) Align labels, and compute the loss: `merge` puts each label at its token, and -100
    at image tokens and padding. The loss is the mean cross-entropy over all labels that are
    not -100, each predicted from the token before it in its row.
    - A row's first token is not predicted, and does not count.
    - Where no label counts the loss is 0, which can be back-propagated.
    - Tower, projector and decoder get the loss's gradients, in training and in eval.
8.5 (correctness) Padding changes nothing: a row in a batch gets the logits that it gets alone.
    - The mask hides padding on either side, row by row. What stands there counts for nothing.
    - `merge` drops it and puts padding back on padding_side. S is the longest row's length.
    - The new mask is True at tokens alone. position_ids count a row's tokens: 0, 1, 2, …
8.6 (correctness) Train in two stages: `set_stage(1)` trains the projector, `set_stage(2)` projector
    and decoder, and neither the tower. Until it is called everything trains.
    - What a stage does not train has requires_grad False and .grad None; the rest has True.
    - From then on the tower is in eval mode, also after train(), which changes all else as usual.
      `set_stage` itself changes no other mode. In stage 1 the decoder may be in either.
    - Stages may follow each other in any order. Any other stage raises ValueError.
8.7 (correctness) Generate: `generate` gives the greedy tokens that running the whole sequence again
    for each token gives, row by row. After a row's eos_token_id comes pad_token_id.
    It tracks no gradients, and returns no inference tensor, unless called in inference_mode.
8.8 (efficiency) Compute each thing once: `merge`, `forward` and `generate` call the tower once with
    all images, and not at all without images.
    - `generate` reads the prompts of all rows in one call of the decoder, then one token per row
      and call: at most max_new_tokens calls, and none once every row has ended.
8.9 (robustness) Mix dtypes: tower, projector, decoder and images may differ (bfloat16, float32,
    float64). Gradients have their parameters' dtype.
8.10 (correctness) Write your own test: `test_vision_language` passes on right code, whoever wrote
    it, and fails on each of the slips listed below.
8.11 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one, for
    each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    id -> tokens   placeholder: fc2(gelu(fc1(tower(image)))), T of them; any other: embed(id)
    gelu(x)      = x · Φ(x), the exact one
    loss         = mean of -log softmax(logits[b, s - 1])[labels[b, s]]
                   over rows b and places s ≥ 1 with labels[b, s] ≠ -100

Shapes
    B rows, L ids a row, S tokens of the longest row, D d_model, V vocabulary
    M images [M, C, H, W], T tokens an image; P patch size, G = image_size // P

By hand
    T = 2, placeholder -200, images a and b with tokens a1, a2, b1, b2; x is anything

                     row 0                  row 1                 positions
      ids            9  -200     5   6      x  -200     7  -200
      mask           1     1     1   1      0     0     1     1
      labels         9     x     5   6      x     x     7     x
      tokens, right  9  a1   a2  5   6      7  b1  b2   .   .     row 1: 0 1 2 . .
      tokens, left   9  a1   a2  5   6      .   .   7  b1  b2     row 1: . . 0 1 2
      labels, right  9 -100 -100 5   6      7 -100 -100 -100 -100

    5 is predicted from a2 and 6 from 5; the first tokens, 9 and 7, are not predicted.
    With softmax(logits) = 1/2 for 5 at a2 and 1/4 for 6 at 5: loss = (ln 2 + ln 4) / 2 = 1.0397

    A table of 2 × 2 positions, one number each, for grids of other sizes (rows / columns):
      2 × 2  0 32 / 64 96      1 × 2  32 64      1 × 4  28.625 39.25 56.75 67.375

Conventions
- input_ids and labels are int64 [B, L], attention_mask 0/1 [B, L], 1 for visible; None is all ones.
  Only the mask says what is padding. A pad_token_id that the mask shows is a token.
- images None or M = 0 is text alone. A tower is any module [M, C, H, W] -> [M, T, vision_dim].
- Of a decoder you use what Decoder's docstring names. Subclasses keep to it; they may add absolute
  positions, so that each token's own position counts, not distances alone.
- Under padding, position_ids are free, and inputs_embeds too but finite. `forward` pads right.
- A label at a placeholder or at padding counts for nothing. labels may be input_ids itself.
- Images are cast to the dtype of the tower's first parameter, if it has any. Its tokens are cast to
  the projector's dtype, then to the embedding's. Logits have the decoder's dtype; the loss is
  float32 or float64, computed in no less.
- Inputs may be strided and may require gradients. Gradients flow in training and in eval.
- `generate` works in training and in eval, and leaves every mode as it is. Rows that have ended may
  be fed anything, or leave the batch.
- Weights may change between calls, in place, by loading or by a cast; the next call uses the
  new ones, edits of `.data` too.
- Between calls a module keeps nothing but its parameters, its sizes and the stage; no input, no
  mask, no result. A call that failed leaves nothing behind.
- How near, times 1 + |right value|, for values around 1: float64 1e-9, but resized positions and
  the loss with its gradients 1e-5; float32 1e-4; 5e-2 where anything is bfloat16.
- A submission is one file on torch and the standard library.

Not defined
- no rows; a row without a token; a mask with holes between a row's tokens; another padding_side
- a visible id outside the vocabulary that is no placeholder, labels outside it besides -100
- max_new_tokens below 1; a pad_token_id outside the vocabulary; a placeholder that is generated
- integer images; PatchEmbedding without images, or of another dtype than its own; autocast
- once a stage is set: gradients of images, vision.train(), weights that you freeze or thaw then;
  in stage 1 without images: going backward
- weights or images that are not finite; a tower that writes to its images
- modules that share parameters; names of helpers and further attributes

Your own test (8.10) runs on other code, right and wrong, in place of PatchEmbedding, Projector and
VisionLanguageModel. It may use these, their documented attributes, Decoder, Merged, torch, and
functions and classes that you add. It sets its own seed and takes at most 1 s on one thread. The
right code's position_ids are 0 or more and below S, under padding too. How to see
- images and labels: a tower of your own without weights; compare with what a row gets alone
- generation: append each new token, call forward again, take the best at the row's last token
- positions in it: a subclass of Decoder that adds one vector per position. Random weights often
  repeat one token, whatever the slip does: take large ones, small biases, several prompts, 8 tokens
It has to fail on each of these slips:
- positions_transposed: the position table is added column by column
- positions_not_resized: another grid gets the first rows of the table
- images_in_another_order: the last image stands at the first placeholder
- image_tokens_learnt: image tokens carry their placeholder's label
- loss_not_shifted: each label is predicted from its own token
- padding_visible: the new mask is True everywhere
- image_token_hidden: the new mask hides the first token of each image
- positions_count_padding: positions count from the row's first column
- decoder_trains_in_stage_1: stage 1 freezes the tower alone
- tower_trains: the stages leave the tower trainable
- projector_without_gradient: stage 1 leaves nothing to train
- generation_from_padding: the first token comes from the last column, with padding on the right
- generation_positions_stand_still: all new tokens have the position of the prompt's last token
- generation_mask_stands_still: new tokens do not see the new ones before them
- generation_sees_padding: once the prompt is read, padding is visible
- generation_blind: generate drops images and placeholders
- surplus_images_accepted: images without a placeholder are ignored

Discuss
1. Scale to production: images of many sizes and counts arrive; how do you batch tower and decoder?
2. Limits: which questions does a fixed T fail on, and what does a larger T cost?
3. Monitoring: which numbers show that the decoder looks at the image, and not at the text alone?
4. Next: what would you optimise next, in prefill or in decoding, and how would you prove it?

Sources
- Liu et al. 2023, Visual instruction tuning (LLaVA), sections 4.1 and 4.2:
  https://arxiv.org/abs/2304.08485; LLaVA-1.5, section 3.3: https://arxiv.org/abs/2310.03744
- Dosovitskiy et al. 2020, An image is worth 16x16 words (ViT), sections 3.1 and 3.2:
  https://arxiv.org/abs/2010.11929
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]


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
        # TODO(8.1): make proj, and position_embedding of small random numbers.
        raise NotImplementedError("TODO 8.1: PatchEmbedding")

    def forward(self, images: Tensor) -> Tensor:
        """Cuts images into patches.

        Args:
            images: [M, C, H, W].

        Returns:
            [M, (H / P)·(W / P), embed_dim].

        Raises:
            ValueError: H or W is no multiple of P; the message has that length and P.
        """
        # TODO(8.1): refuse bad sides; map each patch, row by row.
        # TODO(8.2): add the position embeddings, resized where the grid is another.
        raise NotImplementedError("TODO 8.1: PatchEmbedding.forward")


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
        # TODO(8.3): make fc1 and fc2.
        raise NotImplementedError("TODO 8.3: Projector")

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., vision_dim] -> [..., d_model], with an exact GELU in between."""
        # TODO(8.3): fc1, GELU, fc2.
        raise NotImplementedError("TODO 8.3: Projector.forward")


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
        # TODO(8.3): keep the parts and the ids, and make the projector.
        raise NotImplementedError("TODO 8.3: VisionLanguageModel")

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
        # TODO(8.3): count the visible placeholders; replace each by its image's projected tokens.
        # TODO(8.5): drop what the mask hides, pad all rows to the longest, and number each row's tokens.
        # TODO(8.4): give each token its label, and image tokens and padding -100.
        # TODO(8.8): call the tower once, and only if there are images.
        # TODO(8.9): cast the images for the tower, and its tokens for projector and decoder.
        raise NotImplementedError("TODO 8.3: merge")

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
        # TODO(8.4): merge, run the decoder, and compute the loss in float32 or better.
        raise NotImplementedError("TODO 8.4: forward")

    def set_stage(self, stage: int) -> None:
        """Freezes and thaws the parts for a stage of training.

        Args:
            stage: 1: the projector trains; 2: projector and decoder do.

        Raises:
            ValueError: the stage is neither 1 nor 2.
        """
        # TODO(8.6): set requires_grad, let go of old gradients, and see that train() leaves the tower in eval.
        raise NotImplementedError("TODO 8.6: set_stage")

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
        # TODO(8.7): read the prompts, then feed each row's best token back, with its mask and position.
        # TODO(8.8): keep the cache, and stop once every row has ended.
        raise NotImplementedError("TODO 8.7: generate")


def test_vision_language() -> None:
    """Your own test of all three classes: passes on right code, fails on each slip listed above."""
    # TODO(8.10): build tiny towers and decoders, and assert what right code does.
    # TODO(8.11): leave nothing in this file for ruff and mypy to find.
    raise NotImplementedError("TODO 8.10: test_vision_language")
