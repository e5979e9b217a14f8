"""ex10: Data parallel training

Several processes, the ranks, train one model, each on rows of its own. They average gradients
while backward still computes others, and each keeps only a share of the optimizer's state, which
for AdamW is twice the model. Slips here hang a cluster, or let the replicas drift apart in silence.

Steps
1. Equal start and averages (40 min): 10.1, 10.2
2. Buckets (30 min): 10.3
3. Overlap and missing gradients (45 min): 10.4, 10.5
4. Accumulation (15 min): 10.6
5. The sharded optimizer (65 min): 10.7, 10.8
6. Its checkpoints (35 min): 10.9
7. Your own test, and style (45 min): 10.10, 10.11

Requirements
10.1 (correctness) Equal start: after `DataParallel(module)` every parameter and buffer is rank 0's
    bit for bit, NaN too: also frozen, tied, strided, 0-dimensional and empty ones, buffers that are
    not saved, integers, bool, bfloat16. They stay the same objects and keep requires_grad.
10.2 (correctness) The same as one process: after backward and `finish` every .grad is what one
    process gets from the rows of all ranks; on 1, 2 and 3 ranks, within 1e-10 in float64.
    - So are the parameters after 5 steps of AdamW, with tied, frozen and strided ones.
    - `global_mean` gives each row the same weight, however many a rank has; it may have none.
    - Gradients of 40000 in float16, or 2e38 in float32, on each rank average to that.
    - From scratch: it calls no DistributedDataParallel, FullyShardedDataParallel, `fully_shard`,
      ZeroRedundancyOptimizer, nor what builds on them.
10.3 (efficiency) Buckets: gradients travel in buckets, in every step the same; 1 rank does it too.
    - The trainable parameters go in, each once, in the reverse order of `module.parameters()`.
    - A bucket ends where the next parameter has another dtype, or would take its gradients over
      bucket_cap_mb · 2**20 bytes. A parameter larger than that has a bucket of its own.
    - A bucket is one asynchronous all_reduce of one flat tensor in its dtype: its gradients, then
      at most one number per parameter, to tell whether it has one.
    - In place of these numbers `finish` may add one all_reduce of up to 8 bytes per parameter.
10.4 (efficiency) Overlap: a bucket starts inside backward as soon as its gradients are ready and
    all buckets before it have started, whatever order gradients come in, in every step. Backward
    waits for nothing. `finish` waits for every bucket.
10.5 (robustness) Missing gradients: a parameter may lack its gradient (.grad is None at `finish`)
    on one rank, on all, or in some steps; a rank may run no backward. All ranks still make the same
    calls. A missing gradient counts as zero; where all ranks lack it, .grad stays None.
10.6 (correctness) Accumulate: a backward under `no_sync` sends nothing. The next one outside sends,
    with `finish`, each bucket once, overlapped. .grad is then the average of all it got, also of
    parameters that only took part before. With no backward outside, `finish` sends all buckets.
    Whether backward, not forward, runs in its `with` block counts; it nests, survives exceptions.
10.7 (efficiency) A share of the state: on every rank, constructing and stepping leaves at most
    (state of optimizer_class alone) / ranks + (state of the largest parameter) bytes alive, beside
    parameters, gradients and what it returned; after every other method too.
    - A step makes only broadcast and all_gather calls, however many, of at most (bytes of trainable
      parameters) + ranks · (bytes of the largest) in all; an all_gather counts every rank's input.
10.8 (correctness) Sharded equals unsharded: after each step the parameters are what optimizer_class
    alone gives, within 1e-12 in float64, and the same on all ranks bit for bit. That holds for
    AdamW, SGD, groups, schedulers, changed hyperparameters, closures, two dtypes, strided or frozen
    parameters, some without a gradient, ranks without a share, later groups. From scratch as 10.2.
10.9 (correctness) Checkpoints: on every rank `state_dict` gives what optimizer_class alone would,
    before the first step too. It loads there, and here on any number of ranks, over what was there;
    training goes on as if never stopped.
10.10 (correctness) Write your own test: `test_data_parallel` passes on right code, whoever wrote
    it, and fails on each of the slips listed below.
10.11 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one,
    for each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    .grad           = (sum over the ranks of what .grad has accumulated there) / ranks
    global_mean     = (sum of this rank's losses) · ranks / (number of losses on all ranks)
    one bucket      = all_reduce([g₁ / ranks, g₂ / ranks, …, at most a number per parameter])
    sharded step    = each rank steps its share, then all get every parameter from its rank

Shapes
    losses [n], n differs between ranks; global_mean a scalar; a flat bucket [numbers + parameters]

By hand
    global_mean    losses [1, 2, 3] on rank 0, [10] on rank 1. The mean of all four is 4.
      rank 0       6 · 2 / 4 = 3, a gradient of 1/2 for each loss
      rank 1       10 · 2 / 4 = 5, also 1/2; the average of 3 and 5 is 4. The mean of means is 6.

    Four float64 parameters, registered a, b, c, d, of 3, 2, 4 and 5 numbers; a cap of 56 bytes
      bucket 0     d, 40 bytes; c would make it 72       a tensor of 5 to 6 numbers
      bucket 1     c and b, 48 bytes; a would make 72    6 to 8
      bucket 2     a, 24 bytes                           3 to 4

    ready          c       b       d                     a
    starts         -       -       bucket 0, bucket 1    bucket 2
    The same where rank 1 lacks c: there bucket 0 starts at d, buckets 1 and 2 in `finish`; on rank
    0 as above. With [2, 2, 2, 2] as c's .grad on rank 0, both ranks end with [1, 1, 1, 1].

    AdamW holds 16 bytes per number here and 4 per parameter as a count: 52, 36, 68, 84, in all 240
      2 ranks      a and d 136, b and c 104, for example
      a rank of 2  at most 240 / 2 + 84 = 204 bytes; a step sends at most 112 + 2 · 40 = 192

Conventions
- You write against `torch.distributed`; its default group is there before you are called.
- Beside get_rank and get_world_size these of its calls are offered: all_reduce, broadcast,
  all_gather, all_gather_single, all_gather_object, broadcast_object_list, barrier. Of an
  asynchronous one use `wait()`.
- The result of an asynchronous call appears in `wait()`, not before. Until then the tensor belongs
  to the call: do not write to it.
- all_reduce adds in the tensor's dtype, and ReduceOp.AVG divides only after that.
- Every rank makes the same calls in the same order; a cluster would hang, here an error comes.
- Ranks are threads here: what differs between them lives in no global, class or function attribute.
- A gradient is ready once backward outside `no_sync` has computed all of it, also where a parameter
  is used twice. What only an earlier backward gave is not ready: its bucket starts in `finish`.
- Between two `finish` at most one backward of a rank runs outside `no_sync`, the last one. `finish`
  runs on every rank after backward, before gradients are read.
- requires_grad stays as it was at construction; buffers are sent at construction alone.
- `global_mean` has the dtype of losses, and counts up to 2**24 exactly, also 70000 in float16.
  At least one rank has a loss. It makes calls of its own, on every rank.
- optimizer_class works element by element: SGD, Adam, AdamW. Gradients are the same on all ranks,
  or None on all. params is a list or generator of parameters or groups, the same on every rank.
- `param_groups` holds all parameters and hyperparameters, as optimizer_class would. What is changed
  there, by a scheduler or by hand, counts from the next step on; lr may be a tensor.
- `step` calls its closure once on every rank and returns what that returns.
- `state_dict` and `load_state_dict` copy: later steps change neither what was saved nor what was
  given. Values agree within 1e-12. Every rank calls both, with any of the calls offered.
- How near elsewhere, times 1 + |right value|: float64 1e-9; float32 5e-6; float16, bfloat16 2e-2.
- A submission is one file on torch and the standard library.

Not defined
- what an error inside backward leaves behind; hooks that fire twice in it (reentrant checkpoints)
- `finish` inside `no_sync`; one context of it entered twice, or two that do not end in turn
- gradients that are sparse, or that are changed between backward and `finish`
- casting or moving a module once DataParallel or ShardedOptimizer has it; wrapping one twice
- trainable parameters without elements; parameters and buffers whose elements share memory
- losses whose sum, times ranks, their dtype cannot hold; losses that need no gradient
- tensors that you send and that are not contiguous
- shares (10.7) where state per number differs: by options, or as some never have a gradient
- closures whose values differ between ranks, or under no_grad; .grad after `step`
- frozen parameters with a .grad; keys of a group that a dict which is loaded lacks
- ranks that reach each other by other ways than calls
- whether .grad stays the same tensor; its strides; keys of DataParallel's state_dict
- names of further attributes and helpers

Your own test (10.10) runs on other code, right and wrong, in place of DataParallel, `global_mean`,
ShardedOptimizer and `run_ranks`. It may use these, torch, its distributed calls and helpers of the
test. It uses `run_ranks`, and compares within tolerances, whatever the strides. It sets
its own seed and takes at most 1 s without first imports (an optimizer: torch._dynamo). How to see
- ranks: build one replica each before `run_ranks`; the random generator is shared by its threads
- what happened: return tensors from the ranks, and compare outside
It has to fail on each of these slips:
- starts_apart: rank 0's parameters do not go to the others
- sums: .grad is the sum over the ranks
- no_sync_lost: what backward added under `no_sync` is lost
- missing_kept_apart: a rank that lacks a gradient does not get the average
- shards_stale: parameters of other ranks' shares are not updated
- scheduler_unseen: what a scheduler changes in `param_groups` reaches no step
- one_shard_saved: `state_dict` holds this rank's share alone

Discuss
1. Scale to production: what changes from 2 ranks to 1000 on many machines, and what sets the cap?
2. Limits: when is averaging, or a sharded state, no longer enough? What do you shard next?
3. Monitoring: which numbers show that a rank is slow, hangs, or has drifted from the others?
4. Next: what would you optimise next, and how would you prove that it helped?

Sources
- Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
  section 3.2: https://arxiv.org/abs/2006.15704
- Rajbhandari et al. 2019, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
  section 5.1: https://arxiv.org/abs/1910.02054
"""

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _distributed_c10d as c10d
from torch.testing._internal.distributed import multi_threaded_pg as threaded

T = TypeVar("T")


class DataParallel(nn.Module):
    """A module that is trained on every rank at once, each with rows of its own.

    Args:
        module: this rank's replica; rank 0's parameters and buffers go to all, in place.
        bucket_cap_mb: the gradients of a bucket take at most this many MiB, unless it holds one parameter alone.

    Attributes:
        module: as given.
    """

    def __init__(self, module: nn.Module, bucket_cap_mb: float = 25.0) -> None:
        super().__init__()
        # TODO(10.1): keep the module, and give every rank what rank 0 has.
        # TODO(10.3): put the trainable parameters into buckets, the last one first.
        # TODO(10.4): have each gradient say in backward that it is ready; the last one of a bucket may start it.
        raise NotImplementedError("TODO 10.1: __init__")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with whatever comes.

        Args:
            args: the module's arguments.
            kwargs: the module's keyword arguments.

        Returns:
            What the module returns.
        """
        # TODO(10.2): pass everything on.
        raise NotImplementedError("TODO 10.2: forward")

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward adds to .grad and sends nothing."""
        # TODO(10.6): let no bucket start inside; the context may nest, and may end with an exception.
        raise NotImplementedError("TODO 10.6: no_sync")

    def finish(self) -> None:
        """Ends a step's communication: afterwards every .grad is the average over the ranks.

        Every rank calls it after backward, before gradients are read.
        """
        # TODO(10.2): make every .grad the average over the ranks.
        # TODO(10.5): start the buckets that lack a gradient, in their order; tell a missing one from zeros.
        # TODO(10.4): wait for all buckets, and be ready for the next step.
        raise NotImplementedError("TODO 10.2: finish")


def global_mean(losses: Tensor) -> Tensor:
    """The loss whose average over the ranks is the mean over all losses of all ranks.

    Args:
        losses: [n], one for each row of this rank; n differs between ranks and may be 0.

    Returns:
        A scalar in the dtype of losses.
    """
    # TODO(10.2): count the losses of all ranks, and weigh those of this one.
    raise NotImplementedError("TODO 10.2: global_mean")


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is spread over the ranks, each of which steps its own share (ZeRO-1).

    Args:
        params: parameters or groups, as torch's optimizers take them; the same on every rank.
        optimizer_class: works element by element.
        defaults: what optimizer_class takes besides.

    Attributes:
        param_groups: those of optimizer_class over all parameters; changes count from the next step on.
    """

    def __init__(
        self, params: Iterable[Any], optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **defaults: Any
    ) -> None:
        # TODO(10.8): make param_groups what optimizer_class makes of params and defaults.
        # TODO(10.7): choose each rank's share, so that no rank has more than its part and one parameter.
        raise NotImplementedError("TODO 10.8: __init__")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps this rank's share, then brings every parameter to all ranks.

        Args:
            closure: computes the loss again; called once on every rank.

        Returns:
            What closure returns; None without one.
        """
        # TODO(10.8): step the share with the hyperparameters as they are now, then send and receive.
        # TODO(10.7): keep nothing of what was sent.
        raise NotImplementedError("TODO 10.8: step")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do.

        Args:
            param_group: "params", and hyperparameters of its own.
        """
        # TODO(10.8): add it; the base class calls this too, while it is constructed.
        # TODO(10.7): share it out beside what is there.
        raise NotImplementedError("TODO 10.8: add_param_group")

    def state_dict(self) -> dict[str, Any]:
        """What optimizer_class alone would return, as copies, on every rank."""
        # TODO(10.9): gather the shares, and keep none of the others'.
        raise NotImplementedError("TODO 10.9: state_dict")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict returned here, in another world, or in optimizer_class.

        Args:
            state_dict: the same on every rank; it stays as it is.
        """
        # TODO(10.9): copy this rank's share and the groups, over whatever was there.
        raise NotImplementedError("TODO 10.9: load_state_dict")


# Given; no need to change.
def run_ranks(world_size: int, function: Callable[[int], T]) -> list[T]:
    """Calls function(rank) in threads that form one process group, as its default one.

    Args:
        world_size: how many ranks.
        function: what each rank does.

    Returns:
        What the ranks return, in rank order; the first error of a rank is raised.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    store, hook = dist.HashStore(), sys.excepthook

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", store=store, rank=rank, world_size=world_size)
            results[rank] = function(rank)
        except BaseException as error:
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)  # the other ranks stop waiting
        finally:
            dist.destroy_process_group()

    c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]
        sys.excepthook = hook
    if errors:
        raise errors[0]
    if len(results) < world_size:
        raise TimeoutError(f"of {world_size} ranks {sorted(results)} have ended; the others wait")
    return [results[rank] for rank in range(world_size)]


def test_data_parallel() -> None:
    """Your own test of this file: passes on right code, fails on each slip listed above."""
    # TODO(10.10): train replicas on a few ranks by run_ranks; compare with one process.
    # TODO(10.11): leave nothing in this file for ruff and mypy to find.
    raise NotImplementedError("TODO 10.10: test_data_parallel")
