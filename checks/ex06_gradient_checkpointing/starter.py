"""ex06: Gradient checkpointing

Training keeps every layer's activations until backward has used them; they often need more memory
than the model itself. Gradient checkpointing keeps only a layer's inputs and computes the layer a
second time in backward: about a third more computation for a fraction of the memory.
You write it on top of autograd, wrap chosen layers with it, and measure what it saves.

Steps
1. One layer, computed twice (40 min): 6.2, 6.10
2. The layers of any model (35 min): 6.1
3. Any call, exact gradients (75 min): 6.3, 6.4, 6.7
4. Memory and training (35 min): 6.5, 6.6
5. Your own test, and style (40 min): 6.8, 6.9

Requirements
6.1 (correctness) Selective checkpointing of layers: `apply_checkpointing` wraps the layers number
    0, n, 2n … of a model and names them in order; "In plain text" says what a layer is.
    - Every parameter and every other module, lists too, stays the same object.
    - The state_dict of a wrapped model, or of a wrapper alone, has the plain keys in their order
      and the plain values, with prefix and keep_vars too, whatever a layer's parts are called.
    - It loads strictly into a plain model, and back; the dict that is loaded does not change.
    - A missing or unexpected key raises load_state_dict's own RuntimeError, which names it.
6.2 (efficiency) Memory against computation: a wrapped layer keeps its inputs alone for backward.
    - A training step (forward, then backward) enters each chosen layer, and each module in it,
      exactly twice, and every other module once.
    - After forward, with only the output held, less is alive the more layers are chosen. With each
      of 8 encoder layers it is less than 0.25 of what it is with none; random states do not count.
    - In eval, without gradients, or with use_checkpoint=False a layer gives its plain output and
      is entered once.
    - When its output is let go, nothing of a call is alive (in cycles: once they are collected).
    - A wrapper starts with its module's training flag. No flag changes; train(), eval() still work.
6.3 (robustness) Mixed precision: each call's second forward runs under the autocast state of its
    first (float16, bfloat16 or off). Backward may run under another one, and leaves that as it is.
6.4 (correctness) Nested modules, any arguments: a wrapped module trains as the plain one does.
    - It may stand inside another wrapper, and hold wrapped modules.
    - Arguments and keyword arguments are tensors, masks, numbers, text and None, in nested tuples,
      lists and dicts; a call may have no tensor at all.
    - Outputs are of the same kinds, with the plain values; backward may use some of them.
    - A tensor input gets the plain gradient if it needs one. If none does, parameters still train.
    - Inputs are never written to, not even to be restored.
6.5 (correctness) Clear memory measurement: `measure_memory_usage` calls `func` once and returns its
    result and the peak in MiB, to 10 % or 0.01 MiB, as a dispatch mode that follows storages
    (`torch.utils._python_dispatch.TorchDispatchMode`) sees. An error of `func`, KeyboardInterrupt
    too, comes out as the same object, and nothing stays switched on.
6.6 (efficiency) A model that does not fit: `train_step` trains a wrapped model for several steps,
    with plain training's losses and at most two thirds of its peak bytes alive.
    It clears old gradients before backward, and calls model, criterion and optimizer.step once.
6.7 (correctness) Gradients: after `.backward()` each parameter has the plain model's gradient, in
    float64 to nine digits. Where the plain model has none, zeros are as good.
    - That holds with dropout under a seed, in later steps, in a second backward (retain_graph).
    - The random stream is where a plain step leaves it, whatever is drawn or seeded in between.
    - Nothing is computed below the input's dtype. What you keep stays in its own dtype, and
      autocast lowers only what it lowers in the plain model.
6.8 (correctness) Write your own test: `test_gradient_checkpointing` passes on right code, whoever
    wrote it, and fails on each of the slips listed below.
6.9 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one, for
    each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.
6.10 (correctness) Write it from scratch: nothing of `torch.utils.checkpoint`, the standard tool,
    is reached, neither in forward nor in backward.

In plain text
    forward   y = f(x)              keep x and the states (random, autocast)
    backward  y = f(x) once more    under these states; then dL/dx, dL/dw
    memory    of N layers: N·a plain, N·i + a with every layer wrapped

    An attribute name matches if it contains layer_pattern and not "norm"; upper and lower case
    differ. Go through the model depth first, in the order of named_children():
      no match                            no layer; look inside
      match, nn.ModuleList or Sequential  its elements are layers
      match, any other module             a layer
      element that is an nn.ModuleList    opened likewise, at any depth
      any other element                   a layer, an nn.Sequential too
    Elements may have any name, "norm" too. Subclasses count as their base. No layer holds layers.

Shapes
    B batch, L positions, V vocabulary; w f's parameters; bytes of a layer: i input, a all inside

By hand
    f(x) = (w·x)² with w = 2, x = 3, dL/dy = 1
      forward    y = 36; plain autograd keeps w·x = 6 too, you keep x = 3
      backward   w·x = 6 again; dL/dw = 2·6·x = 36, dL/dx = 2·6·w = 24

    n = 2, counted over the whole model      entered in a training step
      embedding                              1
      encoder.layers   nn.ModuleList
        0              layer 0, wrapped      2
        1              layer 1               1
        2              layer 2, wrapped      2
      layer_norm       "norm": no layer      1
      decoder.layers   nn.Sequential
        0              layer 3               1
        1              layer 4, wrapped      2

    x + 1 - 2 + 3 for an x of 1 MiB: alive are 1 MiB after + 1 (x was there before),
    2 after - 2 (then x + 1 goes), 2 after + 3; the peak is 2, their sum 3

Conventions
- A submission is one file on torch and the standard library.
- Inputs, a batch and logits may be strided: transposed, expanded, overlapping.
- Weights may change between calls, in place, by loading or by a cast; the next call uses the new
  ones. They may also be new objects (assign=True), shared between layers, frozen, or thawed later.
- Between calls a module keeps nothing but its parameters and what this text names; no input, no
  mask, no result. What a call keeps for its backward hangs on its output.
- `checkpoint` asks nothing: it is only called with a module, in training, with gradients enabled.
  The wrapper decides.
- A step is as good after calls in eval or without gradients, and after one that failed, which
  leaves nothing switched on.
- An output carries a gradient where the plain one does, and none if no weight or input needs one.
- One tensor given as several arguments is one tensor the second time too: attention asks whether
  its key is its query. Two that share memory are two: x and x.detach().
- A layer may be called several times before backward, and is entered twice for each call. Other
  counts are right too: any in a second backward, twice or more inside two wrappers, once or twice
  where backward needs nothing (frozen weights, or x + b). BatchNorm's buffers may be written twice.
- Memory is the bytes of storages made in `func`, 1 MiB = 2^20 bytes: a view costs nothing, nor
  does a tensor from before, nor what is written into it (out=).

Not defined
- no match; a second apply_checkpointing; n < 0; a layer that the model holds twice; a matching
  nn.ModuleDict or nn.ParameterList; matching attribute names with "Norm"
- weights or modes that change between forward and backward; weights that a layer uses without
  holding them (by a closure); memory inside a nested wrapper while the outer one recomputes
- torch.autograd.grad, backward(inputs=…), double backward; code that writes in place to a layer's
  input or output; whether y.detach() or a buffer as output carries a gradient if a weight needs one
- names in named_parameters; further attributes of a wrapper (nn.TransformerEncoder reads some); a
  state_dict's _metadata, which BatchNorm reads; the wrapper's part in the key that an error names
- tensors in other containers (namedtuple); Python's random; CUDA; a peak torch.profiler contradicts

Your own test (6.8) runs on other code, right and wrong, in place of your `checkpoint`,
CheckpointWrapper, SelectiveCheckpointing, `measure_memory_usage` and `train_step`.
It may use these, MemoryEfficientTransformer, torch and helpers in this file; not names of
parameters, what a wrapper registers, or counts that the text leaves open. It sets its own seed and
takes at most 1 s; first imports do not count (a dispatch mode imports torch._dynamo). How to see
- entries: put a forward pre-hook on a module inside each layer (linear1) before you wrap
- gradients by key: state_dict(keep_vars=True)
- keyword arguments: let the gradient depend on one (src_mask of an encoder layer)
- the autocast state: call forward inside torch.autocast, backward outside
It has to fail on each of these slips:
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
1. Scale to production: for 70 billion parameters on many GPUs, which activations do you recompute,
   which do you keep, and which do you move to the CPU?
2. Limits: what does checkpointing every layer not reduce; from which length on does it not help?
3. Monitoring: which numbers tell you that recomputation is worth its time, and is still exact?
4. Next: which operations would you keep instead, and how would you prove that it helped?

Sources
- Chen et al. 2016, Training deep nets with sublinear memory cost: https://arxiv.org/abs/1604.06174
- Korthikanti et al. 2022, Reducing activation recomputation in large transformer models:
  https://arxiv.org/abs/2205.05198
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function`, keeps only its inputs, and computes it a second time when backward needs what was forgotten.

    Args:
        function: the module to call.
        args: its arguments: anything, also nested structures with tensors.
        kwargs: its keyword arguments, likewise.

    Returns:
        What `function` returns.
    """
    # TODO(6.2, 6.10): run forward so that nothing inside is kept for backward: an autograd.Function, or hooks.
    # TODO(6.3): remember the autocast state, and compute the second time under it.
    # TODO(6.4): pass on everything; start the second computation from detached inputs, one for each different tensor.
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
        # TODO(6.2): keep what forward needs, and take over the training flag.
        # TODO(6.1): keep the module's names in the state_dict (state_dict hooks do this).
        raise NotImplementedError("TODO 6.2: CheckpointWrapper")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with whatever comes; recomputes in backward only while training with gradients enabled.

        Args:
            args: the module's arguments.
            kwargs: the module's keyword arguments.

        Returns:
            What the module returns.
        """
        # TODO(6.2): checkpoint only in training, with gradients enabled, and if use_checkpoint says so; else call the
        # module. Pass on all arguments and outputs as they are.
        raise NotImplementedError("TODO 6.2: CheckpointWrapper.forward")


class SelectiveCheckpointing:
    """Wraps every n-th layer of a model.

    Args:
        checkpoint_every_n_layers: n; 1 wraps every layer, 2 every second one, 0 none.

    Attributes:
        checkpointed_modules: dotted names of the layers that are wrapped, in the model's order; empty at first.
    """

    def __init__(self, checkpoint_every_n_layers: int = 2) -> None:
        # TODO(6.2): keep n; no layer is wrapped yet.
        self.checkpointed_modules: list[str] = []
        raise NotImplementedError("TODO 6.2: SelectiveCheckpointing")

    def apply_checkpointing(self, model: nn.Module, layer_pattern: str = "layer") -> None:
        """Wraps the layers number 0, n, 2n … of `model`, in place.

        Args:
            model: any model; it is changed.
            layer_pattern: what the attribute name of a layer, or of a list of layers, contains.
        """
        # TODO(6.2): replace every n-th element of a ModuleList `layers` by its wrapper.
        # TODO(6.1): find the layers of any model, in order, and keep the names of those that you wrap.
        raise NotImplementedError("TODO 6.2: apply_checkpointing")


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
    """Makes one step of training: forward, backward, the optimizer's step; old gradients go before backward.

    Args:
        model: gives logits [B, L, V] for input ids [B, L]; it is in training mode.
        batch: "input_ids" and "targets", int64 [B, L].
        optimizer: over the model's parameters.
        criterion: gives the loss for logits [B·L, V] and targets [B·L].

    Returns:
        The loss before the step, as a Python float.
    """
    # TODO(6.6): make one step; give the criterion all positions in one row.
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
    # TODO(6.8): compare a wrapped model with a plain one: gradients, keys, entries, random stream; measure a peak.
    # TODO(6.9): make lint-clean, typed code of it all.
    raise NotImplementedError("TODO 6.8: test_gradient_checkpointing")
