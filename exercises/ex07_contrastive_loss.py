"""ex07: Contrastive loss (CLIP)

CLIP learns from pairs of an image and a text. Among the N pairs of a batch each image has to find
its own text, and each text its image. The more pairs, the more there is to learn from; but there
are N·N logits, which soon need more memory than the model.
You write the head and the loss, then the same loss in chunks and over several ranks of a process
group, and two ways to evaluate what was learned.

Steps
1. Head and loss (40 min): 7.1, 7.2, 7.3
2. The loss in chunks (60 min): 7.5, 7.4
3. The loss over ranks (50 min): 7.6, 7.7
4. Half precision (35 min): 7.8
5. Evaluation (20 min): 7.9
6. Your own test, and style (45 min): 7.10, 7.11

Requirements
7.1 (correctness) Build the head: `forward` gives the projected rows, each of length 1 within 1e-9
    in float64, and scale = exp(logit_scale), which starts at 1/temperature.
    - Features, both projections and logit_scale get the gradients of that, in eval too.
    - image_proj.weight, text_proj.weight and logit_scale are the whole state_dict.
    - Weights may change between calls, in place, by loading or by a cast; the next call uses them.
7.2 (robustness) Bound the temperature: scale = min(exp(logit_scale), max_scale) in float64, float32
    and half precision, in eval too, for any logit_scale and for max_scale from 0.01 to 10000.
    - Beyond the bound logit_scale is not stuck: its gradient is finite and has the sign of the
      scale's gradient, also at logit_scale = 1000. How large it is there is up to you.
    - `forward` may write the bound into logit_scale. It leaves one within the bound as it is.
7.3 (correctness) Compute the symmetric loss: `contrastive_loss` gives the formula's value and
    gradients, with one match or several, for rows of any length and for N = 1.
    - Ids are any int64 numbers, negative and huge ones too.
    - At scale 100 in float32, a loss of unit rows is within 1e-4 · max(1, loss).
    - ValueError names both shapes if image and text have different ones.
7.4 (efficiency) Keep memory O(N): chunked_contrastive_loss holds one chunk of logits at a time, in
    forward and in backward, with groups too.
    - For chunk_size > E no tensor has more than 2·chunk_size·N elements; masks count too.
    - At twice N, with 6 chunks in place of 3, the peak is less than 2.2 times as high.
    - With only the loss held, at most 3 times the bytes of (image, text) are alive besides them, in
      float32 with E > 6. Once the loss is let go, nothing is.
    - Loop over chunks, not over rows or groups: with N and chunk_size both doubled, forward and
      backward make at most 1.2 times as many torch operations.
7.5 (correctness) Chunks change nothing: chunked_contrastive_loss is contrastive_loss, with its
    gradients and its ValueError, for any chunk_size, also above N.
7.6 (correctness) Shards change nothing: averaged over 1, 2, 3 or more ranks, as DDP averages,
    sharded_contrastive_loss and the gradients of its rows, of scale and of an encoder that the
    ranks share are those of contrastive_loss on all rows, in the order of the ranks.
    - Ranks hold different numbers of pairs, at least one each.
7.7 (efficiency) Never hold all logits on a rank: where n > E on each rank, no tensor has more than
    2·n·N elements, in forward and in backward.
7.8 (robustness) Work in half precision: what the head and the three losses return is float32 or
    better, for bfloat16 and float16, for mixed dtypes, and under autocast.
    - A loss of unit rows is within 1e-4 · max(1, loss) of the float64 loss of the same rows. Its
      gradients have their tensors' dtypes. They are off by at most 2 units in the last place of
      their largest entry, or 1e-4; in float32 by 1e-4 · (1 + largest entry).
    - The head's rows have length 1 within 1e-5, also where float16 cannot hold length or square.
7.9 (correctness) Evaluate: `zero_shot_weights` and `recall_at_k`, as "In plain text" says.
7.10 (correctness) Write your own test: `test_contrastive` passes on right code, whoever wrote it,
    and fails on each of the slips listed below.
7.11 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one, for
    each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    s_ij = scale · image_i · text_j
    P_i  = {j: groups_j = groups_i}, or {i} without groups
    log p_ij = s_ij - log Σ_k exp(s_ik)   over row i: image i looks for texts
    log q_ji = s_ji - log Σ_k exp(s_ki)   over column i: text i looks for images
    loss = -1/(2N) · Σ_i 1/|P_i| · Σ_{j in P_i} (log p_ij + log q_ji)

    zero_shot_weights, for each class: encode every template.format(name) without gradient tracking,
      normalise each row, average over the templates, normalise again.
    recall_at_k, for each k: the share of all queries whose rank is at most k.
      rank = 1 + the number of negatives that score at least as high as the best positive
      A query without a positive, or with a NaN among its scores, is missed at every k.

Shapes
    N pairs, n of them on a rank; E features of a row; C classes; M candidates
    image, text [N, E]   groups int64 [N]   scale, loss []   weights [C, E]   similarity [N, M]

By hand
    scale log 2; image (1, 0) and (0, 1); both texts (1, 0)
      exp(s)     p                q: columns    log p_11 + log q_11 = log 1/2 + log 2/3 = -1.0986
      2   2      1/2   1/2        2/3   2/3     log p_22 + log q_22 = log 1/2 + log 1/3 = -1.7918
      1   1      1/2   1/2        1/3   1/3     loss = (1.0986 + 1.7918) / 4 = 0.7226
      on two ranks   the shares 1.0986/4 and 1.7918/4, times 2: 0.5493 and 0.8959, of mean 0.7226
    scale 1; image and text (1, 0), (0, 1)
      loss           log(1 + e) - 1 = 0.3133; as one group log(1 + e) - 1/2 = 0.8133
      gradients      p_11 = q_11 = 0.7311, so dL/ds_11 = (0.7311 + 0.7311 - 2) / 4 = -0.1345;
                     dL/ds_12 = 0.1345; dL/dimage_1 = (-0.1345, 0.1345); dL/dscale = -0.2689
    max_scale 100    logit_scale 4 gives 54.598; 5 gives 100, not 148.41
    two templates    rows (3, 0), (0, 4) -> (1, 0), (0, 1) -> mean (0.5, 0.5) -> (0.7071, 0.7071)
    recall           scores 0.9 0.9 0.1 0.5, of which the first is positive: its rank is 2

Conventions
- Only the head normalises; the losses take rows as they come. A row of zeros stays zeros.
- scale is a tensor [] above 0. image, text, scale: any of them may need no gradient.
- A loss may be multiplied before backward (on all ranks alike). A second backward is right too.
- Inputs may be strided: transposed, expanded, overlapping. Image and text may be one tensor.
- Inputs are never written to, not even to be restored.
- Between calls a module keeps nothing but its parameters and what this text names; no input, no
  mask, no result. The functions keep nothing. A call that failed leaves nothing behind.
- "Under autocast" means around the call, not around backward, as PyTorch advises.
- An error gives shapes as Python prints them, in any brackets: `2, 3`.
- Ranks are threads with a `Communicator` each. All ranks make the same calls in the same order, in
  backward too; what comes back is new and carries no gradient, a rank's own part included.
- DDP averages gradients over the ranks, it does not add them. So a rank's own rows get, times the
  number of ranks, what contrastive_loss on all rows gives them. What a rank's own value is, its
  share or the whole loss, is up to you, as long as the mean is right.
- encode_text takes a list of texts and returns a row of any length for each, once or often.
- positives are boolean or 0/1 in uint8, int32, int64, float32 or float64. Without them the diagonal
  is positive. k may exceed M.
- How near, times 1 + |right value|: float64 1e-9; float32 1e-4, shares 1e-6. In half precision the
  head's rows and gradients 5e-2, scale 4e-2.
- A submission is one file on torch and the standard library.

Not defined
- sizes of 0, chunk_size or k below 1; NaN or infinity but in similarity
- features or projections too large for their dtype; rows of a length below 1e-6 that are not zeros
- features of another dtype than the head's, but under autocast; backward under autocast
- gradients of a row of zeros; second derivatives; tensors that change before backward
- sharded: groups, image and text that do not fit, a scale, E or dtype that differs between ranks,
  a gradient that only some ranks need
- evaluation but in float32 and float64; what contrastive_loss costs; further attributes, helpers

Your own test (7.10) runs on other code, right and wrong, in place of your ContrastiveHead and
functions. It may use these, Communicator, run_ranks, torch and helpers in this file, and of a head
image_proj, text_proj and logit_scale. It sets its own seed and takes at most 1 s. How to see
- a bound that sticks: set logit_scale to 6, and look at its gradient
- chunks, ranks: compare loss and gradients with those of the formula on all rows
It has to fail on each of these slips:
- rows_not_normalised: the head's rows keep their length
- no_bound: scale is exp(logit_scale), however large
- bound_that_sticks: beyond the bound logit_scale gets no gradient
- one_direction: no loss lets texts look for images
- one_direction_in_chunks: that of the chunks does not
- groups_ignored: each pair matches itself alone
- targets_from_zero: in every chunk the targets begin with pair 0
- texts_without_gradient: in chunks the texts get none
- scale_without_gradient: in chunks the scale gets none
- gathered_without_gradient: rows get none from other ranks' losses
- labels_without_offset: on every rank the labels begin with pair 0
- shares_not_scaled: the mean over the ranks is the loss divided by their number
- one_template: only the first template counts
- ties_as_hits: negatives that score as high as the positive do not count

Discuss
1. Scale to production: a batch of 65536 pairs on 256 GPUs. What does each of them hold, send and
   compute, and which of your functions do you use?
2. Limits: which pairs make this loss wrong or useless (duplicates, captions that fit many images)?
   What does a sigmoid loss (SigLIP) make unnecessary?
3. Monitoring: which numbers show early that training collapses, or that the scale is held?
4. Next: what would you optimise next (chunks, precision, communication), and how would you prove
   that it helped?

Sources
- Radford et al. 2021, "CLIP", section 2.3 and figure 3: https://arxiv.org/abs/2103.00020
- Yang et al. 2022, "UniCL", section 3.2 (several matches): https://arxiv.org/abs/2204.03610
- Li et al. 2022, "BLIP" (its code writes the bound back): https://arxiv.org/abs/2201.12086
- Ilharco et al., open_clip, src/open_clip/loss.py (`local_loss`, `gather_with_grad`):
  https://github.com/mlfoundations/open_clip
- Zhai et al. 2023, "SigLIP", section 3: https://arxiv.org/abs/2303.15343
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class ContrastiveHead(nn.Module):
    """Projects image and text features into one space, and learns how sharply to compare there.

    Args:
        image_dim: number of image features.
        text_dim: number of text features.
        embed_dim: number of features E of both in the common space.
        temperature: 1 / the scale at the start.
        max_scale: the largest scale.

    Attributes:
        image_proj, text_proj: nn.Linear without bias.
        logit_scale: nn.Parameter of shape [], the logarithm of the scale before it is bounded.
    """

    def __init__(
        self, image_dim: int, text_dim: int, embed_dim: int, *, temperature: float = 0.07, max_scale: float = 100.0
    ) -> None:
        super().__init__()
        # TODO(7.1): make image_proj, text_proj and logit_scale, which starts at log(1 / temperature).
        # TODO(7.2): keep what bounds the scale, and keep it out of the state_dict.
        raise NotImplementedError("TODO 7.1: ContrastiveHead")

    def forward(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeds the features of N pairs.

        Args:
            image_features: [N, image_dim].
            text_features: [N, text_dim].

        Returns:
            The unit rows of the images [N, E] and of the texts [N, E], and the scale [].
        """
        # TODO(7.1): project, normalise each row, and return the scale too.
        # TODO(7.2): bound the scale; a plain clamp gives no gradient beyond the bound.
        # TODO(7.8): normalise in float32 at least.
        raise NotImplementedError("TODO 7.1: ContrastiveHead.forward")


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None) -> Tensor:
    """The mean loss of finding each image's texts and each text's images among N.

    Args:
        image: [N, E].
        text: [N, E].
        scale: [], what the products of rows are multiplied with.
        groups: int64 [N], an id for each pair; pairs with the same id match each other. None: each matches itself.

    Returns:
        [].

    Raises:
        ValueError: image and text have different shapes; the message names both.
    """
    # TODO(7.3): compute all logits, their logarithms of p and q, and the mean over each pair's matches.
    # TODO(7.8): compute in float32 at least, whatever comes in and whatever autocast says.
    raise NotImplementedError("TODO 7.3: contrastive_loss")


def chunked_contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, groups: Tensor | None = None, chunk_size: int = 256
) -> Tensor:
    """contrastive_loss in O(N) memory, in forward and in backward.

    Args:
        image: [N, E].
        text: [N, E].
        scale: [].
        groups: int64 [N], as in contrastive_loss.
        chunk_size: how many rows of logits may be held at once; it may exceed N.

    Returns:
        [].

    Raises:
        ValueError: image and text have different shapes; the message names both.
    """
    # TODO(7.5): go through chunks of rows; what a column needs from all of them is gathered on the way.
    # TODO(7.4): keep no chunk for backward, compute it anew there.
    # TODO(7.8): compute in float32 at least, whatever comes in and whatever autocast says.
    raise NotImplementedError("TODO 7.5: chunked_contrastive_loss")


def sharded_contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, comm: "Communicator") -> Tensor:
    """contrastive_loss of the pairs of all ranks, of which this rank holds n.

    Args:
        image: [n, E], this rank's.
        text: [n, E], this rank's.
        scale: [], the same on all ranks.
        comm: what this rank reaches the others by.

    Returns:
        [], whose mean over the ranks is the loss, and the mean of whose gradients is the loss's.
    """
    # TODO(7.6): compare this rank's rows with those of all ranks, and give every rank's rows all their gradient.
    # TODO(7.7): hold n·N logits at a time, not N·N.
    # TODO(7.8): compute in float32 at least, whatever comes in and whatever autocast says.
    raise NotImplementedError("TODO 7.6: sharded_contrastive_loss")


def zero_shot_weights(
    encode_text: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """A unit row for each class, from several prompts: a classifier without training.

    Args:
        encode_text: gives each of n texts a row of any length, [n, E].
        class_names: the C names.
        templates: prompts with a place for a name, such as "a photo of a {}."; each is filled by template.format(name).

    Returns:
        [C, E], without gradient: the mean of a class's unit rows, of length 1 again.
    """
    # TODO(7.9): encode the prompts of each class without gradient tracking; normalise, average, normalise again.
    raise NotImplementedError("TODO 7.9: zero_shot_weights")


def recall_at_k(
    similarity: Tensor, positives: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """The share of the queries that have a positive among their k best candidates.

    Args:
        similarity: [N queries, M candidates].
        positives: bool or 0/1 [N, M]; None: the diagonal.
        ks: the numbers k, at least 1.

    Returns:
        The share for each k.
    """
    # TODO(7.9): rank the best positive of each query among its negatives, and count.
    raise NotImplementedError("TODO 7.9: recall_at_k")


def test_contrastive() -> None:
    """Your own test of this file: passes on right code, fails on each slip listed above."""
    # TODO(7.10): build a few pairs whose loss you know, and assert what right code does.
    # TODO(7.11): leave nothing in this file for ruff and mypy to find.
    raise NotImplementedError("TODO 7.10: test_contrastive")


# Given; no need to change.
class Communicator:
    """One rank of a process group whose ranks are threads. As in torch.distributed, all ranks make the same calls in
    the same order; what comes back is new and carries no gradient, this rank's own part included.

    Attributes:
        rank: 0 … world_size - 1.
        world_size: how many ranks there are.
    """

    def __init__(self, rank: int, world_size: int, meeting: "_Meeting") -> None:
        self.rank = rank
        self.world_size = world_size
        self._meeting = meeting

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in the order of the ranks; their first sizes may differ."""
        call = f"all_gather of {tensor.dtype} [n, {', '.join(map(str, tensor.shape[1:]))}]"
        return [part.clone() for part in self._meeting.exchange(self.rank, call, tensor)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all ranks."""
        first, *others = self._meeting.exchange(self.rank, f"all_reduce of {tensor.dtype} {[*tensor.shape]}", tensor)
        return sum(others, first.clone())


class _Meeting:
    """Where the ranks meet: a call is done once all ranks have made it, and fails once one of them cannot."""

    def __init__(self, world_size: int) -> None:
        self.calls: dict[int, dict[int, tuple[str, Tensor]]] = {}  # number of a call -> rank -> what it brings
        self.made = [0] * world_size
        self.gone: set[int] = set()
        self.changed = threading.Condition()

    def exchange(self, rank: int, call: str, tensor: Tensor) -> list[Tensor]:
        """What all ranks bring to this rank's next call."""
        with self.changed:
            number = self.made[rank]
            brought = self.calls.setdefault(number, {})
            self.made[rank] += 1
            brought[rank] = call, tensor.detach().clone()
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(brought) == len(self.made) or self.gone - brought.keys())
            self.calls.pop(number, None)
            if missing := self.gone - brought.keys():
                raise RuntimeError(f"rank {rank} waits in {call}; rank {min(missing)} has ended without that call")
            calls = [brought[other][0] for other in sorted(brought)]
            if len(set(calls)) > 1:
                raise RuntimeError(f"the calls of ranks 0, 1, … differ: {calls}")
            return [brought[other][1] for other in sorted(brought)]

    def leave(self, rank: int) -> None:
        """No call of this rank comes any more."""
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()


# Given; no need to change.
def run_ranks(function: Callable[[Communicator], Any], world_size: int) -> list[Any]:
    """Calls function(comm) once per rank, each in a thread of its own; what the calls returned, by rank.

    The first error of a rank is raised here, once all have ended.
    """
    meeting, results, errors = _Meeting(world_size), [None] * world_size, []

    def run(rank: int) -> None:
        try:
            results[rank] = function(Communicator(rank, world_size, meeting))
        except BaseException as error:
            errors.append(error)
        finally:
            meeting.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
