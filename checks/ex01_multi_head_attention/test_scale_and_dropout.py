"""Scale and dropout (1.5): 1/√head_dim once, dropout on the weights alone, in training only, by torch's seed."""

import pytest
import torch

from harness.testing import Close, Subject, is_tensor, requirement, seed

from .reference import LK, LQ, VALUES, B, D, H, agree, as_a_whole, build, inputs, reference, unpack


@requirement("1.5")
def test_scores_by_hand(subject: Subject, close: Close) -> None:
    """Two features and one head: q·k / √2."""
    attention = build(subject, d_model=2, heads=1)
    q = torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[3.0, 5.0], [0.0, -1.0]]]], dtype=torch.float64)
    expected = torch.tensor([[[[13 / 2**0.5, -2 / 2**0.5]]]], dtype=torch.float64)

    scores = attention.compute_attention_scores(q, k)

    close(
        scores,
        expected,
        "compute_attention_scores([1, 2], [[3, 5], [0, -1]])",
        hint="13 and -2, divided by √head_dim = √2",
        tolerance=VALUES,
    )


@requirement("1.5")
def test_scores_are_scaled_by_head_dim(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The factor is 1/√head_dim: neither missing, nor 1/√d_model, nor 1/head_dim."""
    q, k = (torch.randn(B, H, n, D // H, generator=rng, dtype=torch.float64) for n in (LQ, LK))
    product = torch.einsum("bhqd,bhkd->bhqk", q, k)

    scores = is_tensor(build(subject).compute_attention_scores(q, k), "compute_attention_scores(q, k)")

    wanted = (D // H) ** -0.5
    came = float((scores.detach() * product).sum() / product.square().sum()) if scores.shape == product.shape else 0.0
    hint = f"the scores are {came:.4g} × q kᵀ; 1/√head_dim = {wanted:.4g}" if scores.shape == product.shape else ""
    close(scores, product * wanted, "compute_attention_scores(q, k)", hint=hint, tolerance=VALUES)


@requirement("1.5")
def test_forward_scales_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """forward's weights are the softmax of the scaled scores, not of scores scaled twice or not at all."""
    given = inputs(rng)
    rule = "weights: softmax over the keys of q kᵀ / √head_dim, scaled once"
    agree(close, build(subject), [3 * x for x in given], hint="with inputs 3 times as large", rule=rule)


@requirement("1.5")
@pytest.mark.parametrize("p", [0.5, 0.2])
def test_dropout_acts_on_the_weights_alone(subject: Subject, close: Close, rng: torch.Generator, p: float) -> None:
    """In training, with a mask (of ones) too, a weight is 0 or w / (1 - p), and the output is made from these."""
    query, key, value = inputs(rng, lq=40, lk=50)
    attention = build(subject, dropout=p).train()
    _, expected = reference(attention, query, key, value)
    v = attention.v_linear(value).detach().unflatten(-1, (H, -1)).transpose(1, 2)

    for more in ([], [torch.ones(B, 1, 1, 50, dtype=torch.bool)]):
        output, weights = unpack(attention(query, key, value, *more))

        assert weights.shape == expected.shape, (
            f"forward: weights of shape {tuple(weights.shape)} came, {tuple(expected.shape)} was wanted"
        )
        kept, what = weights != 0, f"forward in training with dropout {p}{' and a mask of ones' * bool(more)}"
        share = 1 - kept.double().mean().item()
        assert abs(share - p) < 0.05, (
            f"{what}: {share:.2g} of the weights returned are dropped, {p} was wanted{as_a_whole(kept)}"
        )
        close(weights[kept], expected[kept] / (1 - p), f"{what}: weights kept by dropout",
              hint=f"a kept weight is w / (1 - {p}): the mean is preserved; those after dropout are returned",
              tolerance=VALUES)  # fmt: skip
        joined = (weights.detach() @ v).transpose(1, 2).flatten(2)
        close(output, attention.output_linear(joined).detach(), f"{what}: output",
              hint="the output is made from the weights that are returned, and nothing else is dropped",
              tolerance=VALUES)  # fmt: skip


@requirement("1.5")
def test_dropout_differs_per_head_query_and_key(subject: Subject, rng: torch.Generator) -> None:
    """Weights are dropped one by one, not whole heads, rows or columns."""
    given = inputs(rng, lq=40, lk=50)
    attention = build(subject, dropout=0.5).train()

    with torch.no_grad():  # Dropout goes by the module's mode alone.
        dropped = unpack(attention(*given))[1] == 0

    share = dropped.double().mean().item()
    assert 0.4 < share < 0.6, (
        f"forward in training under no_grad: {share:.2g} of the weights are dropped, 0.5 was wanted"
        f"{as_a_whole(~dropped)}"
    )
    for dim, name in enumerate(("batch rows", "heads", "queries", "keys")):
        alike = (dropped == dropped.narrow(dim, 0, 1)).double().mean().item()
        assert alike < 0.9, f"forward in training: the same weights are dropped for all {name}"


@requirement("1.5")
def test_dropout_follows_torchs_seed(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The same seed drops the same weights; another call drops others."""
    given = inputs(rng)
    attention = build(subject, dropout=0.5).train()

    seed(7)
    first, second = unpack(attention(*given))[1], unpack(attention(*given))[1]
    seed(7)
    again = unpack(attention(*given))[1]

    close(
        again,
        first.detach(),
        "forward in training: weights",
        tolerance=0,
        hint="the same torch.manual_seed gives others",
    )
    assert (first != second).any(), (
        "forward in training: two calls drop the same weights; dropout 0.5 does nothing or never changes"
    )


@requirement("1.5")
def test_no_dropout_in_eval(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """In eval nothing is dropped, also after training and with train() again off."""
    given = inputs(rng)
    attention = build(subject, dropout=0.5).train()
    attention(*given)

    agree(close, attention.eval(), given, hint="in eval dropout does nothing")


@requirement("1.5")
def test_dropout_zero_and_one_in_training(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """With dropout 0 training gives what eval gives; with dropout 1, set afterwards, nothing is left."""
    given, attention = inputs(rng), build(subject, dropout=0.0).train()
    agree(close, attention, given, hint="dropout is 0 here")

    attention.dropout.p = 1.0
    _, weights = unpack(attention(*given))

    close(weights, torch.zeros_like(weights), "forward in training with dropout 1: weights", tolerance=0)


@requirement("1.5")
def test_a_large_dropout_keeps_the_mean_in_half_precision(subject: Subject, rng: torch.Generator) -> None:
    """In bfloat16 dropout 0.998 keeps 0.002 of the weights: random numbers of 8 bits would keep 1/256."""
    given = [x[:, :, :4] for x in inputs(rng, torch.bfloat16, 150, 200)]
    attention = build(subject, dropout=0.998, d_model=4, heads=1).bfloat16().train()

    with torch.no_grad():
        weights = unpack(attention(*given))[1]

    share = weights.count_nonzero().item() / weights.numel()
    assert 0.0011 < share < 0.0029, (
        f"forward in training in bfloat16 with dropout 0.998: {share:.4f} of the weights are kept, 0.0020 was wanted"
        + "\ndraw and compare in float32: random numbers or a p in bfloat16 are too coarse (0.998 becomes 0.996)"
        * (share < 0.02)
    )
