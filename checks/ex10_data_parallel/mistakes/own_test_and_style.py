"""Own tests that say too little or too much (10.10), and what does not read well (10.11)."""

from harness.model.bank import Mistake

SEED = "    torch.manual_seed(0)\n    rows = "
VALUES = "        torch.testing.assert_close(list(replica.parameters()), list(alone.parameters()))\n"
SAVED = '        torch.testing.assert_close(saved[rank]["state"], optimizer.state_dict()["state"])\n'

MISTAKES = [
    Mistake(
        "own_test_asserts_nothing",
        "10.10",
        "passes although the code under it is wrong",
        (SEED, "    return\n" + SEED),
        only=True,
    ),
    Mistake(
        "own_test_only_runs",
        "10.10",
        "passes although",
        (VALUES + SAVED, "        assert replica is not None and saved[rank]\n"),
        only=True,
    ),
    Mistake("own_test_skips_the_dict", "10.10", "passes although", (SAVED, ""), only=True),
    Mistake(
        "own_test_of_one_rank",
        "10.10",
        "passes although",
        ("for n in (4, 1)]", "for n in (5,)]"),
        ("    saved = run_ranks(2, train)\n", "    saved = run_ranks(1, train)\n"),
        ("for ends in ((False, False), (False, True)):", "for ends in ((False,), (False,)):"),
        only=True,
    ),
    Mistake(
        "own_test_is_wrong",
        "10.10",
        "fails on right code",
        ("torch.cat(losses).mean().backward()", "torch.cat(losses).sum().backward()"),
        only=True,
    ),
    Mistake(
        "own_test_asks_for_bits",
        "10.10",
        "fails on right code",
        (
            VALUES,
            (
                "        assert all(torch.equal(a, b) for a, b in zip(replica.parameters(), "
                "alone.parameters(), strict=True))\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "own_test_asks_for_strides",
        "10.10",
        "fails on right code",
        (
            "        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)\n",
            (
                "        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)\n"
                "        self.first.weight = nn.Parameter(self.first.weight.detach().mT.contiguous().mT)\n"
            ),
        ),
        (
            "            model.finish()\n",
            (
                "            model.finish()\n"
                "            for parameter in model.parameters():\n"
                "                assert parameter.grad is not None and parameter.grad.is_contiguous()\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "own_test_with_adamw",
        "10.10",
        "passes although",
        (
            "ShardedOptimizer(replicas[rank].parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)",
            "ShardedOptimizer(replicas[rank].parameters(), torch.optim.AdamW, lr=0.1)",
        ),
        ("torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)", "torch.optim.AdamW(alone.parameters(), lr=0.1)"),
        (SAVED, '        assert set(saved[rank]["state"]) == set(optimizer.state_dict()["state"])\n'),
        only=True,
    ),
    Mistake(
        "an_import_too_many", "10.11", "imported but unused", ("import copy\n", "import copy\nimport math\n"), only=True
    ),
    Mistake(
        "no_types",
        "10.11",
        "mypy",
        ("def _broadcast(tensor: Tensor, source: int) -> None:", "def _broadcast(tensor, source):"),
        only=True,
    ),
]
