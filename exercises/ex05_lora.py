"""ex05: LoRA

Low-rank adaptation fine-tunes a large model without changing its weights. Each chosen linear layer
keeps its W and gets two thin matrices A and B beside it. Only A and B are trained and saved, which
is rank·(in + out) numbers, not out·in. Once training is over, B A can be added to W.

Steps
1. The layer, put into a model (40 min): 5.1, 5.3, 5.4
2. Any layer of any model (55 min): 5.2, 5.7
3. Merging (30 min): 5.5
4. Saving and comparing (30 min): 5.6, 5.8
5. Your own test, and style (40 min): 5.9, 5.10

Requirements
5.1 (correctness) Support different rank values: any rank and any alpha give the formula's output.
    - At the start the output is the original's: B is zero. A is random, another in each adapter.
    - A's rows all differ, also where rank > in, and span min(rank, in) dimensions.
    - x, A and B get the formula's gradients, in training and in eval. The first step of gradient
      descent moves B, the second moves every row of A.
    - Weights may change between calls, in place, by loading (assign=True too) or by a cast; the
      next call uses the new ones, edits of `.data` too.
    - A rank below 1 raises ValueError, from `apply_lora_to_model` at the latest.
5.2 (correctness) Adapt any linear layer: an `nn.Linear`, subclasses too, with or without bias.
    - Exactly the layers that match a target are adapted, at any depth, as the config says.
    - If nothing matches, as by [], ValueError names the targets and some linear layers, if any.
    - x is [..., in], of any strides, with many rows or none.
      Inputs are never written to, not even to be restored.
    - A layer that its parent reads and never calls works, or TypeError says that it cannot.
5.3 (correctness) Keep the original weights frozen: after `apply_lora_to_model`, A and B alone are
    trainable in the whole model. Training steps leave every other parameter as it was, bit for bit.
5.4 (efficiency) Reduce the parameters significantly: an adapter adds rank·(in + out) trainable
    numbers and keeps nothing else of W's or x's size, in a buffer, attribute, list or closure.
    - `count_parameters` counts shared parameters once, and buffers never.
    - `forward` of a few rows makes no tensor of out·in elements or more at any rank, in training
      and eval, but views, scaled A or B, autocast's casts and the weight that a parent reads.
5.5 (correctness) Merge back easily: a merged layer's forward is one matrix product and gives the
    unmerged output without dropout, in float32 within 1e-6 · max(1, largest output).
    - Merging twice is merging once. Unmerging what is not merged does nothing.
    - Unmerging gives W back bit for bit, in bfloat16 too. While merged you hold W and the
      sum, afterwards W alone: no second copy, neither as a tensor nor as bytes, list or array.
    - Training goes on with the same A and B. Merging again uses A, B and W as they are then.
    - A tensor that other modules share stays unchanged, and is shared again after unmerging.
    - A deep copy of a merged layer is merged, and unmerges by itself.
5.6 (efficiency) Compare with full fine-tuning: `compare_fine_tuning` trains one SimpleTransformer
    with all its parameters, and one of the same sizes with adapters alone. Each run makes at least
    `steps` steps, all by `torch.optim.AdamW`. You report what the optimizer really held.
5.7 (robustness) Follow the layer: an adapter takes over its layer's dtype, device and training
    flag, and may be cast or moved later.
    - Nothing is computed below the input's dtype. Autocast alone may lower that, but not float64.
    - Dropout acts on the adapter's input alone, in training only, on every element of x by itself,
      also where x is expanded, with the config's probability, also in bfloat16, where torch.rand
      has 256 values alone. torch.manual_seed decides which; the next call drops others.
5.8 (correctness) Save and load the adapter alone: `load_state_dict(saved, strict=False)` into a
    freshly adapted model meets no unexpected key, and restores A, B and the output.
    You save copies of every A and B, bit for bit, merged or not, frozen or not; nothing else.
5.9 (correctness) Write your own test: `test_lora` passes on right code, whoever wrote it, and fails
    on each of the slips listed below.
5.10 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one, for
    each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    output        = x Wᵀ + bias + drop(x) Aᵀ Bᵀ · alpha/rank
    merged weight = W + alpha/rank · B A
    drop(x)       = 0 or x / (1 - dropout) for each element in training, 0 at dropout 1; x in eval

Shapes
    in, out features of the layer; x [..., in]; output [..., out]
    W [out, in]; A = lora_A [rank, in]; B = lora_B [out, rank]

By hand
    in 3, out 2, rank 2, alpha 6, so that alpha/rank = 3; no bias

      W [2, 3]          B [2, 2]   A [2, 3]         merged weight
      1   0   2           1   0    1  -1   2         4   -3    8
      0   1   1   +  3 · -2   1    0   1   0   =    -6   10  -11

    x = [2, 1, 0]: W x = [2, 1], A x = [1, 1], B A x = [1, -1]
      output     [2, 1] + 3 · [1, -1] = [5, -2]; the merged weight times x is [5, -2], too
      dropout    of 0.5 that drops the 2: A gets [0, 2, 0]; [2, 1] + 3 · [-2, 6] = [-4, 19]
    The same with B = 0, as at the start, and a loss L, the sum of the output:
      step 1     dL/dB = [[3, 3], [3, 3]], dL/dA = 0; at rate 0.1 all of B becomes -0.3
      step 2     dL/dA = [[-3.6, -1.8, 0], [-3.6, -1.8, 0]]

      linear layer at      adapted by targets              not by
      q_proj               q_proj                          proj, q, Q_proj, *proj
      blocks.0.q_proj      q_proj, blocks.0.q_proj         0.q_proj, blocks, blocks.0
      blocks.0.q_proj_2    q_proj_2, blocks.0.q_proj_2     q_proj
      blocks.0.q_proj.0    0, blocks.0.q_proj.0            q_proj, blocks.0.q_proj

Conventions
- A target matches a linear layer if it equals the last part of its dotted path, or the whole path.
- Modules of other kinds never match. An idle target or a registered None is passed over.
- `apply_lora_to_model` puts a LoRALinear in the place of each matched layer, in the model itself,
  each with an A and a B of its own, and leaves the config as it is.
- A layer under several matching names, or in a block used twice, gets one adapter in all places.
- A parameter or layer of the base that is called lora_A or adapter stays frozen and is not saved.
- `original_layer` is the layer that was given; `lora_A` and `lora_B` are the trained numbers
  themselves, and writing to them changes the layer.
- Merging leaves them the same parameters: an optimizer built before a merge works after it.
- While merged, `original_layer.weight` is the merged weight in the layer's dtype, not trainable.
- Meanwhile bias, A and B stay as they are, A and B keep requires_grad, and x alone gets a gradient.
- `merge_weights` and `unmerge_weights` alone merge and unmerge, train() and eval() do not; they
  leave the training flag as it is. Two layers that share one W merge apart.
- Some parents read a layer's weight and bias and never call it: `nn.MultiheadAttention` those of
  out_proj, `nn.TransformerEncoderLayer` in eval those of linear1 and linear2, or a model's own.
  An adapter that such a parent ignores would train nothing, and nobody would know. Either
  - it works in training and eval, merged or not, unmerged with gradients for A and B (a `weight`
    property that gives the merged weight does); or
  - TypeError comes, from `apply_lora_to_model`, or from every forward that would leave it out, if
    you like while merged too: an encoder layer may work in training and raise in eval.
- Between calls a module keeps no input, mask or result (5.4); a failed call leaves nothing behind.
- How near, times 1 + |right value|, for x around 1: float64 1e-9, under autocast too; float32 5e-6;
  float16 8e-3; bfloat16, and all but float64 under autocast, 5e-2.
- `trainable_parameters` counts numbers; the bytes of a tensor are its elements times their size.
- `optimizer_bytes` counts each tensor in the optimizer's state after the last step, step counters
  too; `gradient_bytes` counts the .grad of all that the run trains, after its last backward.
- `seconds_per_step` is above 0. Config, data, learning rate and steps to warm up are up to you.
- A submission is one file on torch and the standard library.

Not defined
- a model that is itself an nn.Linear; a layer of which only some names match, whose weight is no
  plain parameter (lazy, weight_norm), or with a forward, hooks or modules of its own; applying
  twice; what a refused model is left like; merging or applying under autocast or inference_mode
- while merged: casting, moving, loading, pickling, writing to W, A or B
- weights that change inside one autocast region, where torch caches its casts of them; the
  output's dtype under autocast; an x of another dtype than the layer's
- whether A's rows differ where in < 3; dropout where a parent reads the weight; a LoRALinear that
  you make yourself with rank 0; whether it freezes its layer before `apply_lora_to_model` does
- a .grad from before; a dropout outside 0 … 1; steps below 1
- names of parameters, keys of a state_dict, further attributes and helpers

Your own test (5.9) runs on other code, right and wrong, in place of your classes and functions.
It may use these, their documented attributes, the given models, torch and helpers of the test; not
names of parameters or keys. A LoRALinear may itself be an nn.Linear. It sets its own seed and takes
at most 1 s, first imports not counted. How to see
- the adapter: B is zero at the start; fill lora_B in place under torch.no_grad()
- rounding: clone the weight before you merge, and compare by torch.equal after you unmerge
- what is trained or saved: count its numbers
It has to fail on each of these slips:
- adapter_ignored: the layer's output is the original's, whatever A and B are
- no_scaling: alpha/rank is left out
- both_random: B starts at random, so that the start is not the original
- both_zero: A and B both start at zero, so that neither ever moves
- other_layers_trainable: only the adapted layers are frozen
- merge_adds_twice: merging twice adds B A twice
- unmerge_subtracts: unmerging subtracts B A, which rounds, in place of restoring W
- substring_match: a target matches if it occurs anywhere in the path
- no_match_accepted: a target list that matches nothing is passed over
- everything_saved: the saved adapter holds the whole model

Discuss
1. Scale to production: how do you serve one base with hundreds of adapters, some in one batch?
2. Limits: for which tasks and ranks does LoRA stay behind full training? How do you know early?
3. Monitoring: which numbers of A, B and B A show that an adapter learns, collapses or drifts?
4. Next: what would you optimise next in memory or time, and how would you prove that it helped?

Sources
- Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4:
  https://arxiv.org/abs/2106.09685
"""

from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """A linear layer with a low-rank adapter beside it.

    Args:
        original_layer: the layer to adapt; it stays reachable under this name.
        rank: number of rows of A, at least 1.
        alpha: the adapter's output is scaled by alpha/rank.
        dropout: probability that an element of the adapter's input is dropped in training.

    Attributes:
        original_layer, rank, alpha: as given.
        scaling: alpha/rank.
        lora_A: [rank, in], random at the start; lora_B: [out, rank], zero at the start. Parameters, or properties that
            give parameters.
    """

    def __init__(self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        # TODO(5.1): keep the arguments, and make A at random and B of zeros.
        # TODO(5.7): take over the layer's dtype, device and training flag; keep what dropout needs.
        # TODO(5.2): decide what a parent gets that reads this module's weight and bias and never calls it.
        raise NotImplementedError("TODO 5.1: __init__")

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output.

        Args:
            x: [..., in].

        Returns:
            [..., out].
        """
        # TODO(5.1): add the adapter's output, scaled, to the original's.
        # TODO(5.4): multiply x by one thin matrix after the other; B A itself is as large as W.
        # TODO(5.5): while merged, return the original's output alone.
        raise NotImplementedError("TODO 5.1: forward")

    def merge_weights(self) -> None:
        """Makes original_layer.weight W + alpha/rank · B A; does nothing where that is done already."""
        # TODO(5.5): keep W, and give the layer a tensor of its own; other modules may share W.
        raise NotImplementedError("TODO 5.5: merge_weights")

    def unmerge_weights(self) -> None:
        """Gives original_layer its own weight W back, bit for bit; does nothing where nothing is merged."""
        # TODO(5.5): give W back and keep nothing of it; subtracting would round.
        raise NotImplementedError("TODO 5.5: unmerge_weights")


class LoRAConfig:
    """What to adapt, and how. Each argument is an attribute of the same name.

    Args:
        rank: rank of every adapter.
        alpha: alpha of every adapter.
        target_modules: names of the layers to adapt; None means ["q_proj", "v_proj"], a new list each time.
        dropout: dropout of every adapter.
    """

    def __init__(
        self, rank: int = 4, alpha: float = 8.0, target_modules: list[str] | None = None, dropout: float = 0.1
    ) -> None:
        # TODO(5.1, 5.2): keep the arguments, and make a new list of the default targets each time.
        raise NotImplementedError("TODO 5.1: LoRAConfig")


def apply_lora_to_model(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freezes a model and puts a LoRALinear in the place of each matched layer, in place.

    Args:
        model: any module; it is changed.
        config: which layers to adapt, and how.

    Returns:
        The same model.

    Raises:
        ValueError: the rank is below 1, or no target matches a linear layer; then the message names the targets and
            some of the model's linear layers.
    """
    # TODO(5.1): put a LoRALinear in the place of each matched layer; refuse a rank below 1, here at the latest.
    # TODO(5.3): leave nothing trainable but A and B.
    # TODO(5.2): find the linear layers that match, under all their names; refuse a target list that matches nothing.
    raise NotImplementedError("TODO 5.1: apply_lora_to_model")


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of a model and nothing else, as copies, under keys that the model's load_state_dict knows.

    An adapter in several places comes once or in each. The model may be a LoRALinear itself.
    """
    # TODO(5.8): copy A and B of each adapter, under the keys of the model's own state_dict.
    raise NotImplementedError("TODO 5.8: lora_state_dict")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers the model's parameters hold: (all, trainable). Shared parameters count once, buffers never."""
    # TODO(5.4): add up the sizes of the parameters, and of those that ask for gradients.
    raise NotImplementedError("TODO 5.4: count_parameters")


def compare_fine_tuning(steps: int = 3) -> dict[str, dict[str, float]]:
    """Trains a SimpleTransformer fully and another one with adapters, each by AdamW for `steps` steps, and measures.

    Args:
        steps: optimizer steps of each run, at least 1.

    Returns:
        {"full": …, "lora": …}, each with the measured numbers trainable_parameters, optimizer_bytes, gradient_bytes
        and seconds_per_step (mean or median).
    """
    # TODO(5.6): train both on random tokens; after the last step read the numbers off model and optimizer.
    raise NotImplementedError("TODO 5.6: compare_fine_tuning")


# Given; no need to change.
class SimpleAttention(nn.Module):
    """Causal self-attention whose four projections are plain linear layers, which are called."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in projected)  # [B, H, L, Dh]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(start_dim=2))  # [B, L, D]


# Given; no need to change.
class PrebuiltAttention(nn.Module):
    """Self-attention by nn.MultiheadAttention, which reads the weight of its out_proj in place of calling it."""

    def __init__(self, d_model: int = 16, num_heads: int = 2) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(d_model, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        attended, _ = self.attention(x, x, x, need_weights=False)
        return attended


# Given; no need to change.
class SimpleTransformer(nn.Module):
    """A small language model: tokens below `vocabulary`, [B, L] -> logits [B, L, vocabulary]."""

    def __init__(self, vocabulary: int = 29, d_model: int = 16, num_heads: int = 2, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.attentions = nn.ModuleList(SimpleAttention(d_model, num_heads) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_layers))
        self.head = nn.Linear(d_model, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, vocabulary]."""
        x = self.embedding(tokens)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.head(x)


def test_lora() -> None:
    """Your own test of LoRA: passes on right code, fails on each slip listed above."""
    # TODO(5.9): build small layers and models with unequal sizes, and assert what right code does.
    # TODO(5.10): leave nothing in this file for ruff and mypy to find.
    raise NotImplementedError("TODO 5.9: test_lora")
