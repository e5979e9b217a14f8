"""ex06: Gradient checkpointing

Training keeps every layer's activations until backward has used them, and they often need more memory than the model
itself. Gradient checkpointing keeps only a layer's inputs, and computes the rest a second time when backward asks for
it: about a third more computation for a fraction of the memory. You write it on top of autograd, wrap chosen layers
with it, and measure what it saves.

Steps
1. One checkpoint (40 min): 6.4, 6.7, 6.10
2. Layers and models (40 min): 6.1, 6.2, 6.3
3. Measuring and training (40 min): 6.5, 6.6
4. Your own test, and style (30 min): 6.8, 6.9

Requirements
6.1 (correctness) Selective checkpointing of layers: exactly the chosen layers are checkpointed, by number (n) and by
    name (`layer_pattern`), also in nested lists. Lists stay lists, parameters the same objects. The state_dict keeps
    its keys, whatever the parts of a layer are called: a plain checkpoint loads strictly into a wrapped model, and
    back; a missing or unexpected key is refused as ever.
6.2 (efficiency) Memory against computation: what is alive after forward, with only the output held, falls as more
    layers are chosen; with every one of 8 encoder layers it is less than 0.25 of what it is with none (random states do
    not count). In a training step each chosen layer, with what is in it, is entered exactly twice, every other module
    once. In eval, without gradients and with use_checkpoint=False the output is the plain one, and nothing is computed
    twice. Once its output is let go, nothing of a call is alive any more (in cycles: once they are collected).
6.3 (robustness) Mixed precision: the second computation runs under the autocast state of the first (float16, bfloat16
    or off), also when backward is called under another one. It is each call's own. (Judged on the CPU.)
6.4 (correctness) Nested modules: wrapped modules inside wrapped ones; keyword arguments, tuples, lists and dicts, masks
    and other arguments that are no tensors; several outputs, and outputs that are no tensors. Inputs without gradient
    still train the parameters, and every tensor input that needs a gradient gets it.
6.5 (correctness) Clear memory measurement: `measure_memory_usage` is within 10 % of what a dispatch mode that follows
    storages (`torch.utils._python_dispatch.TorchDispatchMode`) sees, and of what torch.profiler's memory events tell;
    only cases in which these two agree are judged. An error of `func` goes through unchanged, and nothing stays
    switched on.
6.6 (efficiency) A model that does not fit: the checkpointed model trains for several steps through `train_step`, with
    the same losses, and never has more than two thirds of plain training's peak alive (the check counts the bytes).
6.7 (correctness) Gradients: after `.backward()` every parameter of the wrapped model has the plain model's gradient,
    with dropout under a seed too, in the second step, and in a second backward with retain_graph. They are exact: in
    float64 to nine digits, since nothing is kept or computed below its own dtype. Where the plain model has none,
    zeros are as good. The random stream is where it would be after a plain step.
6.8 (correctness) Write your own test: `test_gradient_checkpointing` passes on right code, whoever wrote it, and fails
    on each of the slips listed below.
6.9 (readability) Reads well: ruff (E, F, W, B, lines up to 120; a docstring for each public class and function that
    you add) and mypy (typed definitions) find nothing. It earns once half of the other requirements do.
6.10 (correctness) Write it from scratch: `torch.utils.checkpoint`, the standard tool, is reached neither in forward nor
    in backward.

In plain text
    forward     y = f(x)                          keep x, the random state and the autocast state; forget the rest
    backward    y = f(x) once more, as it was     then the gradients of x and of f's parameters from dL/dy

Shapes
    B batch, L positions, V size of the vocabulary

Conventions
- A layer is an element of an nn.ModuleList or nn.Sequential whose attribute name contains `layer_pattern`, or any other
  module whose own attribute name does; upper and lower case differ. Attribute names that contain "norm" never match;
  what is inside such a module may. An element is a layer whatever its own name is. Nothing inside a layer is a layer.
- The elements of a matching list are wrapped, never the list, so that code that indexes it goes on working. An element
  that is an nn.ModuleList itself is looked through, since it cannot be called; one that is an nn.Sequential is a layer.
- Layers are counted over the whole model, in its own order, from 0: with n = 2 and the lists encoder.layers (3) and
  decoder.layers (2), encoder.layers.0, encoder.layers.2 and decoder.layers.1 are wrapped.
- What is said of tensors holds for tensors in nested tuples, lists and dicts too, of arguments and of outputs.
- `checkpoint` is judged with modules in training as its function, on its own and through `CheckpointWrapper`; whether
  to recompute at all is the wrapper's question.
- A wrapper takes over its module's training flag: an evaluated layer stays evaluated when it is wrapped, and so does an
  evaluated part of a layer that trains. It need not pass on other attributes of its module, and the names in
  `named_parameters` may change. So may a state_dict's `_metadata`, by which BatchNorm knows old checkpoints.
- A wrapped module may be called several times before backward, its parameters may be frozen or shared with others, and
  it may be cast between steps. Steps are as good after calls without gradients and after one that failed. A module that
  is frozen as a whole gives an output without gradient if its inputs need none.
- One tensor may come as several arguments, and is one tensor the second time too: self-attention asks whether its key
  is its query. Two that share memory are two: x and x.detach(). Inputs, a batch and logits may be strided; neither
  modules nor your code write to them.
- A module inside two wrappers may be entered more often than twice; one from which backward needs nothing, and any
  module in a second backward, as often as you like. What forward writes to buffers (BatchNorm) may be written twice.
- Not defined: no match; a second `apply_checkpointing`; n < 0; a layer that the model holds twice; a matching
  ModuleDict or ParameterList; another mode in backward than in forward; torch.autograd.grad, backward(inputs=…) and
  double backward.
- Memory is the bytes of tensor storage: a view costs nothing, and neither does a tensor that existed before `func` was
  called. 1 MiB = 2^20 bytes. The peak is the most that was alive at once: x + 1 - 2 + 3 for an x of 1 MiB
  has a peak of 2 (their sum is 3).

Your own test (6.8) uses contract names, MemoryEfficientTransformer, torch and helpers of its own in this file only,
sets its own seed, takes at most 1 s once torch is loaded, and has to fail on each of these slips:
- no_checkpointing: the wrapper just calls its module
- parameters_without_gradient: backward computes the gradients of the inputs only
- random_state_not_restored: the second computation draws another dropout
- random_stream_moved: after backward the random stream is not where a plain step leaves it
- autocast_not_restored: the second computation runs under the autocast state of backward
- active_in_eval: layers are computed twice in eval mode too
- every_second_layer: every second layer is wrapped whatever was asked for
- kwargs_dropped: keyword arguments do not reach the second computation
- keys_changed: the state_dict of a wrapped model has other keys
- peak_is_a_sum: measure_memory_usage adds up everything that was ever allocated

Discuss
1. Scale to production: for a model of 70 billion parameters on many GPUs, which activations do you recompute, which do
   you keep, and which do you move to the CPU?
2. Limits: what does checkpointing every layer not reduce, and from which sequence length on does it no longer help?
3. Monitoring: which numbers tell you during a run that recomputation is worth its time, and that it is still exact?
4. Next: which operations would you keep instead of computing them twice, and how would you prove that it helped?

Sources
- Chen et al. 2016, "Training deep nets with sublinear memory cost": https://arxiv.org/abs/1604.06174
- Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models":
  https://arxiv.org/abs/2205.05198
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function`, keeps only its inputs, and computes it a second time when backward needs what was forgotten.

    Args:
        function: what to call; a module, as far as it is judged.
        args: its arguments: anything, also nested structures with tensors.
        kwargs: its keyword arguments, likewise.

    Returns:
        What `function` returns.
    """
    # TODO(6.2, 6.10): run forward so that nothing inside is kept for backward: an autograd.Function, or hooks.
    # TODO(6.3): remember the autocast state, and compute the second time under it.
    # TODO(6.4): pass on everything; the second computation starts from detached inputs, one for each different tensor.
    # TODO(6.7): give inputs and parameters their gradients; draw the same dropout, and leave the random stream alone.
    raise NotImplementedError("TODO 6.2: checkpoint")


class CheckpointWrapper(nn.Module):
    """A module that keeps only its inputs for backward, and is computed a second time there.

    Args:
        module: the module to wrap; its training flag becomes the wrapper's.
        use_checkpoint: False makes the wrapper call its module and do nothing else.
    """

    def __init__(self, module: nn.Module, use_checkpoint: bool = True) -> None:
        super().__init__()
        # TODO(6.1): keep the module's names in the state_dict (state_dict hooks do this).
        # TODO(6.2): keep what forward needs, and take over the training flag.
        raise NotImplementedError("TODO 6.2: CheckpointWrapper")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with whatever comes; recomputes in backward only while training with gradients enabled.

        Args:
            args: the module's arguments.
            kwargs: the module's keyword arguments.

        Returns:
            What the module returns.
        """
        # TODO(6.2): checkpoint only in training, with gradients enabled, and if use_checkpoint says so.
        # TODO(6.4): pass on all arguments and outputs as they are.
        raise NotImplementedError("TODO 6.2: CheckpointWrapper.forward")


class SelectiveCheckpointing:
    """Wraps every n-th layer of a model.

    Args:
        checkpoint_every_n_layers: n; 1 wraps every layer, 2 every second one, 0 none.

    Attributes:
        checkpointed_modules: dotted names of the layers that are wrapped, in the model's order; empty at first.
    """

    def __init__(self, checkpoint_every_n_layers: int = 2) -> None:
        # TODO(6.1): keep n; no layer is wrapped yet.
        self.checkpointed_modules: list[str] = []
        raise NotImplementedError("TODO 6.1: SelectiveCheckpointing")

    def apply_checkpointing(self, model: nn.Module, layer_pattern: str = "layer") -> None:
        """Wraps the layers number 0, n, 2n … of `model`, in place.

        Args:
            model: any model; it is changed.
            layer_pattern: what the attribute name of a layer, or of a list of layers, contains.
        """
        # TODO(6.1): find the layers of the whole model in order, and replace every n-th by its wrapper.
        raise NotImplementedError("TODO 6.1: apply_checkpointing")


def measure_memory_usage(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Calls `func(*args, **kwargs)` and measures the tensor memory that it needs.

    Args:
        func: what to measure.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        What `func` returns, and the most MiB of tensor storage allocated inside that was alive at once.
    """
    # TODO(6.5): follow each new storage until it is freed, with a dispatch mode or torch.profiler.
    raise NotImplementedError("TODO 6.5: measure_memory_usage")


def train_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """Makes one step of training: old gradients off, forward, backward, the optimizer's step.

    Args:
        model: gives logits [B, L, V] for input ids [B, L]; it is in training mode.
        batch: "input_ids" and "targets", int64 [B, L].
        optimizer: over the model's parameters.
        criterion: gives the loss for logits [B·L, V] and targets [B·L].

    Returns:
        The loss before the step, as a Python float.
    """
    # TODO(6.6): one step; the criterion gets its positions in one row.
    raise NotImplementedError("TODO 6.6: train_step")


class MemoryEfficientTransformer(nn.Module):
    """Given; no need to change. A small language model: embedding, encoder layers, and a head.

    Args:
        vocab_size: number of tokens V.
        d_model: number of features.
        num_layers: number of encoder layers.
        num_heads: number of attention heads of a layer.
        dropout: probability of every dropout of a layer.
    """

    def __init__(
        self, vocab_size: int, d_model: int = 64, num_layers: int = 8, num_heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, num_heads, 4 * d_model, dropout, batch_first=True)
            for _ in range(num_layers)
        )
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits for every position.

        Args:
            input_ids: int64 [B, L].

        Returns:
            [B, L, V].
        """
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_gradient_checkpointing() -> None:
    """Your own test of this file: passes on right code, fails on each slip listed above."""
    # TODO(6.8): compare a wrapped model with a plain one: gradients, keys, work, random stream; and measure a peak.
    # TODO(6.9): make lint-clean, typed code of it all.
    raise NotImplementedError("TODO 6.8: test_gradient_checkpointing")
