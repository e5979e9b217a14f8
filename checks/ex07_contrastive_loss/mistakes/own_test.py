"""Own tests that say too little or too much (7.10), and what reads badly (7.11)."""

from harness.model.bank import Mistake

OWN_TEST = "    torch.manual_seed(0)\n    head = ContrastiveHead(4, 3, 2, temperature=0.5, max_scale=100.0)\n"

MISTAKES = [
    Mistake(
        "own_test_asserts_nothing",
        "7.10",
        "passes although the code under it is wrong",
        (OWN_TEST, "    return\n" + OWN_TEST),
        only=True,
    ),
    Mistake(
        "own_test_only_runs",
        "7.10",
        "passes although",
        (
            OWN_TEST,
            """    rows, others, scale = ContrastiveHead(4, 3, 2)(torch.randn(5, 4), torch.randn(5, 3))
    contrastive_loss(rows, others, scale).backward()
    chunked_contrastive_loss(rows.detach(), others.detach(), scale.detach())
    return
"""
            + OWN_TEST,
        ),
        only=True,
    ),
    Mistake(
        "own_test_is_wrong",
        "7.10",
        "fails on right code",
        (
            "assert recall_at_k(torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.5, 0.1]]), ks=(1, 2)) == {1: 0.5, 2: 1.0}",
            "assert recall_at_k(torch.tensor([[0.9, 0.9, 0.1], [0.2, 0.5, 0.1]]), ks=(1, 2)) == {1: 1.0, 2: 1.0}",
        ),
        only=True,
    ),
    Mistake(
        "own_test_asks_for_one_ranks_loss",
        "7.10",
        "fails on right code",
        (
            "    means = [torch.stack(losses).mean()",
            (
                '    assert losses[0] != losses[1], "each rank has a share of its own"\n'
                "    means = [torch.stack(losses).mean()"
            ),
        ),
        only=True,
    ),
    Mistake(
        "own_test_asks_for_a_written_bound",
        "7.10",
        "fails on right code",
        (
            "    assert head.logit_scale.grad is not None",
            (
                '    assert head.logit_scale < 5, "the bound is not written back"\n'
                "    assert head.logit_scale.grad is not None"
            ),
        ),
        only=True,
    ),
    Mistake(
        "untyped_helper",
        "7.11",
        "mypy",
        ("def _check_shapes(image: Tensor, text: Tensor) -> None:\n", "def _check_shapes(image, text):\n"),
        only=True,
    ),
    Mistake(
        "unused_import",
        "7.11",
        "ruff",
        ("import threading\n", "import random\nimport threading\n"),
        only=True,
    ),
]
