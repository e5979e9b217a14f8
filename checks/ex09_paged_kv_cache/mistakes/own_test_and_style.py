"""Own tests that say too little or too much (9.10), and what ruff and mypy find "
"(9.11)."""

from harness.model.bank import Mistake

BEGIN = "    torch.manual_seed(0)\n    allocator = BlockAllocator(3)\n"
RUN = '    assert came == {0: alone[0], 1: alone[1], 2: alone[2][:1]}, "not what each request gets alone"\n'
ATTENDED = (
    "    torch.testing.assert_close(paged_attention(q, cache.keys[0], cache.values[0], tables, *lens), expected)\n"
)
COMMON = "def _common(request: _Request, other: _Request) -> int:\n"

MISTAKES = [
    Mistake("own_test_asserts_nothing", "9.10", "passes although", (BEGIN, "    return\n" + BEGIN), only=True),
    Mistake(
        "own_test_only_runs",
        "9.10",
        "passes although",
        (
            BEGIN,
            ("    engine = Engine(Decoder(11), 8, 2)\n    engine.submit([1, 2], 3)\n    engine.run()\n    return\n")
            + BEGIN,
        ),
        only=True,
    ),
    Mistake("own_test_without_attention", "9.10", "passes although", (ATTENDED, ""), only=True),
    Mistake(
        "own_test_is_wrong",
        "9.10",
        "fails on right code",
        (RUN, RUN.replace("alone[2][:1]", "alone[2]")),
        only=True,
    ),
    Mistake(
        "own_test_leans_on_numbers",
        "9.10",
        "fails on right code",
        (
            BEGIN,
            BEGIN.replace(
                "    allocator", '    assert BlockAllocator(3).allocate() == 0, "not the first block"\n    allocator'
            ),
        ),
        only=True,
    ),
    Mistake("types_left_out", "9.11", "", (COMMON, "def _common(request, other):\n"), only=True),
    Mistake("unused_name", "9.11", "", (COMMON, "import os\n\n\n" + COMMON), only=True),
]
