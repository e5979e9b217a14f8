"""ex05: LoRA

Fine-tuning by low-rank adaptation leaves a linear layer's weight W as it is, and trains two thin matrices beside it:
the layer then works with W + alpha/rank · B A. What is trained, kept by the optimizer and saved shrinks from out·in
numbers to rank·(in + out) for each layer, and B A can be added to W when training is over.

Steps
1. The layer (30 min): 5.1, 5.7
2. Whole models (40 min): 5.2, 5.3, 5.4
3. Merging (30 min): 5.5
4. Saving and comparing (40 min): 5.6, 5.8
5. Your own test, and style (30 min): 5.9, 5.10

Requirements
5.1 (correctness) Support different rank values: the output is the formula's for any rank and alpha, also after weights
    have changed. At the start it is the original's: B is zero, A is not. Gradients reach x, A and B: the first step of
    gradient descent moves B, the second moves A too. A rank below 1 is refused.
5.2 (correctness) Adapt any linear layer: with and without bias, at any depth, under several names, for inputs
    [..., in] of any strides, which are never written to. Exactly the layers that match are adapted, as the config says.
    A target list that matches nothing is refused; a layer that is read as a bare weight works or is refused.
5.3 (correctness) Keep the original weights frozen: after `apply_lora_to_model` the adapters alone are trainable in the
    whole model, and after training steps every other parameter is what it was, byte for byte.
5.4 (efficiency) Reduce the parameters significantly: each adapter adds rank·(in + out) trainable numbers, no more and
    no copy of W, wherever it hangs, and `count_parameters` counts right. `forward` of a few rows, in training and in
    eval, makes no tensor of out·in elements (views aside).
5.5 (correctness) Merge back easily: merged output = unmerged output, within 1e-6 · max(1, largest output) in float32,
    and `forward` makes one matrix product. Merging twice is merging once. Unmerging gives the original weights back bit
    for bit, in bfloat16 too, with no second copy kept, and training goes on with the same A and B; merging again then
    uses their new values. Tensors that other modules share stay unchanged.
5.6 (efficiency) Compare with full fine-tuning: `compare_fine_tuning` trains a `SimpleTransformer` by AdamW, once with
    all its parameters and once with adapters, for at least `steps` steps each, and reports what the optimizer really
    held. Both runs start from the same sizes; config, data, learning rate and warm-up are up to you.
5.7 (robustness) Follow the layer: an adapter takes over its layer's dtype, device and training flag, and may be cast
    or moved later, and called under autocast. Nothing is computed below the layer's dtype (judged in float64). Dropout
    acts on the adapter's input and on nothing else, element by element, in training only, with the config's probability
    (0 to 1), drawn from torch's global stream.
5.8 (correctness) Save and load the adapter alone: `load_state_dict(saved, strict=False)` into a freshly adapted model
    meets no unexpected key and restores the outputs. What is saved, merged or not, holds the adapters and nothing else.
5.9 (correctness) Write your own test: `test_lora` passes on right code, whoever wrote it, and fails on each of the
    slips listed below.
5.10 (readability) Reads well: ruff (E, F, W, B, lines up to 120; a docstring for each public class and function that
    you add) and mypy (typed definitions) find nothing. It earns once half of the other requirements do.

In plain text
    output = original(x) + dropout(x) Aᵀ Bᵀ · alpha/rank        merged weight = W + alpha/rank · B A

Shapes
    in, out features of the layer; W [out, in]; A = lora_A [rank, in]; B = lora_B [out, rank]; x [..., in]

Conventions
- B starts at zero and A does not, so that training starts from the original. A's rows differ, or all ranks would train
  like rank 1.
- A target matches a linear layer (an `nn.Linear`) if it equals the last part of the layer's dotted path, or the whole
  path: "q_proj" and "blocks.0.q_proj" both match the layer at `blocks.0.q_proj`; "proj" and "0.q_proj" do not. Modules
  of other kinds never match.
- Where no target matches anything, as with an empty list, ValueError names the targets and some of the model's linear
  layers; one idle target beside others is fine. For a rank below 1 `LoRAConfig` may raise it already.
- `apply_lora_to_model` puts a LoRALinear in the place of each matched layer. A layer that is registered under several
  matching names gets one adapter, in every place.
- Some parents, torch's or a model's own, never call a linear layer but read its `weight` and `bias`:
  `nn.MultiheadAttention` does so with its out_proj, `nn.TransformerEncoderLayer` in eval with linear1 and linear2.
  There the adapter works, in training and in eval, merged or not, with gradients (its dropout aside), or TypeError says
  that it cannot, from `apply_lora_to_model` or from the forward that would leave it out. An adapter that is silently
  ignored would train nothing and tell nobody.
- `lora_A` and `lora_B` hold the trained numbers themselves and stay the same parameters for good, so that an optimizer
  which was built before a merge works after it; checks write to them in place. Merged or not, A and B stay as they are.
- While merged, `original_layer.weight` is W + alpha/rank · B A (in 16 bits, within a few roundings) and is not trained,
  and nothing is dropped out, in training and in eval. Unmerging what is not merged does nothing; `merge_weights` and
  `unmerge_weights` alone merge and unmerge, no change of mode does.
- Not defined: a model that is itself an nn.Linear; a layer of which only some names match, or whose weight is no plain
  parameter (lazy, weight_norm); applying twice; what a refused model is left like; gradients from before; casting,
  moving or writing to W, A or B while merged. Nor is what a LoRALinear does that you make yourself with rank 0, and
  whether it freezes its layer before `apply_lora_to_model` does. Further attributes and helpers are free.
- The bytes of a tensor are its elements times its element size. `optimizer_bytes` counts every tensor in the
  optimizer's state after the last step, the step counters too; `gradient_bytes` counts the .grad of everything that
  the run trains, after its last backward.

Your own test (5.9) is run with other implementations put in place of the classes and functions, by their names: it
uses contract names only, sets its own seed, takes at most 1 s, and has to fail on each of these slips:
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
1. Scale to production: how do you serve one base model with hundreds of adapters, some of them in the same batch?
2. Limits: for which tasks and ranks does LoRA stay behind full fine-tuning, and how would you know before you pay?
3. Monitoring: which numbers of A, B and B A would you log to see that an adapter learns, collapses or drifts too far?
4. Next: what would you optimise next in memory or time (quantised base, gradients of activations, fused kernels), and
   how would you prove that it helped?

Sources
- Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4: https://arxiv.org/abs/2106.09685
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
        # TODO(5.1): keep the arguments, and make A and B.
        # TODO(5.7): of the layer's dtype, on its device, with its training flag; dropout for the adapter's input.
        # TODO(5.2): decide what a parent gets that reads this module's weight and bias in place of calling it.
        raise NotImplementedError("TODO 5.1: __init__")

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output.

        Args:
            x: [..., in].

        Returns:
            [..., out].
        """
        # TODO(5.1): the original's output plus the adapter's, scaled.
        # TODO(5.4): multiply x by one thin matrix after the other; B A itself is as large as W.
        # TODO(5.5): while merged, the original's output alone.
        raise NotImplementedError("TODO 5.1: forward")

    def merge_weights(self) -> None:
        """Makes original_layer.weight W + alpha/rank · B A; does nothing where that is done already."""
        # TODO(5.5): keep W, and leave the tensor alone that other modules may share.
        raise NotImplementedError("TODO 5.5: merge_weights")

    def unmerge_weights(self) -> None:
        """Gives original_layer its own weight W back, bit for bit; does nothing where nothing is merged."""
        # TODO(5.5): restore, do not subtract.
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
        # TODO(5.2): keep the arguments.
        raise NotImplementedError("TODO 5.2: LoRAConfig")


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
    # TODO(5.2): find the linear layers that match, under all their names; refuse a target list that matches nothing.
    # TODO(5.1): refuse a rank below 1, here at the latest.
    # TODO(5.3): leave nothing trainable but the adapters.
    raise NotImplementedError("TODO 5.2: apply_lora_to_model")


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters of a model and nothing else, as copies, under keys that the model's load_state_dict knows.

    An adapter in several places comes once or in each. The model may be a LoRALinear itself.
    """
    # TODO(5.8): pick the adapters' entries.
    raise NotImplementedError("TODO 5.8: lora_state_dict")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers the model's parameters hold: (all, trainable). Shared parameters count once, buffers never."""
    # TODO(5.4): count.
    raise NotImplementedError("TODO 5.4: count_parameters")


def compare_fine_tuning(steps: int = 3) -> dict[str, dict[str, float]]:
    """Trains a SimpleTransformer fully and another one with adapters, each by AdamW for `steps` steps, and measures.

    Args:
        steps: optimizer steps of each run, at least 1.

    Returns:
        {"full": …, "lora": …}, each with the measured numbers trainable_parameters, optimizer_bytes, gradient_bytes
        and seconds_per_step (mean or median).
    """
    # TODO(5.6): train on random tokens; read the numbers off the model and the optimizer after the last step.
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
    # TODO(5.10): make lint-clean, typed code of it all.
    raise NotImplementedError("TODO 5.9: test_lora")
