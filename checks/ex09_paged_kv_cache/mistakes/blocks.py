"""Wrong block allocators (9.1)."""

from harness.model.bank import Mistake

CHECK = "        if not 0 <= block < len(self._counts) or not self._counts[block]:\n"
REFUSE = 'raise ValueError(f"block {block} is not in use")'
START = "        self._counts = [0] * num_blocks\n        self._free = list(range(num_blocks))\n"
POP = "        block = self._free.pop()\n        self._counts[block] = 1\n"
NONE_FREE = '            raise OutOfBlocksError(f"all {len(self._counts)} blocks are in use")\n'
BACK = "        self._counts[block] -= 1\n        if not self._counts[block]:\n            self._free.append(block)\n"
SHARE = "        self._check_used(block)\n        self._counts[block] += 1\n"

MISTAKES = [
    Mistake(
        "block_handed_out_twice",
        "9.1",
        "(num_free, counts) after allocate",
        (POP, POP.replace("self._free.pop()", "self._free.pop() if self._free[0] else self._free[0]")),
    ),
    Mistake(
        "double_free", "9.1", "was accepted", (CHECK, "        if not 0 <= block < len(self._counts):\n"), only=True
    ),
    Mistake(
        "negative_numbers_count_from_the_end",
        "9.1",
        "block -1",
        (CHECK, "        if block >= len(self._counts) or not self._counts[block]:\n"),
        only=True,
    ),
    Mistake(
        "num_blocks_is_an_index_error",
        "9.1",
        "IndexError",
        (CHECK, "        if block < 0 or not self._counts[block]:\n"),
        only=True,
    ),
    Mistake(
        "one_block_too_many_is_known",
        "9.1",
        "5, that is num_blocks",
        (START, START.replace("[0] * num_blocks", "[0] * num_blocks + [1]")),
        only=True,
    ),
    Mistake("nameless_refusal", "9.1", "it lacks", (REFUSE, 'raise ValueError("a block is not in use")'), only=True),
    Mistake(
        "refusal_changes_counts",
        "9.1",
        "(num_free, counts) after",
        (
            BACK,
            "        self._counts[block] -= 1\n"
            "        if self._counts[block] <= 0:\n"
            "            self._free.append(block)\n",
        ),
        (
            'ValueError as for share."""\n',
            'ValueError as for share."""\n'
            "        if 0 <= block < len(self._counts) and not self._counts[block]:\n"
            "            self._free.append(block)\n",
        ),
        only=True,
    ),
    Mistake("share_is_not_counted", "9.1", "2 was wanted", (SHARE, "        self._check_used(block)\n")),
    Mistake(
        "share_takes_free_blocks",
        "9.1",
        "was accepted",
        (
            SHARE,
            (
                "        if not 0 <= block < len(self._counts):\n"
                "            self._check_used(block)\n"
                "        self._counts[block] += 1\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "free_for_all_at_once",
        "9.1",
        "ref_count after free",
        (BACK, "        self._counts[block] = 0\n        self._free.append(block)\n"),
    ),
    Mistake(
        "free_at_one",
        "9.1",
        "num_free after free",
        (BACK, BACK.replace("if not self._counts[block]", "if self._counts[block] <= 1")),
    ),
    Mistake(
        "freed_blocks_keep_a_count",
        "9.1",
        "ref_count of a block that was handed out again",
        (
            POP,
            POP.replace(
                "self._counts[block] = 1",
                "self._counts[block] += 1 + (block in self._old)\n        self._old.add(block)",
            ),
        ),
        (START, START + "        self._old: set[int] = set()\n"),
    ),
    Mistake(
        "freed_blocks_never_come_back",
        "9.1",
        "your code raises",
        (
            POP,
            (
                "        block, self._next = self._next, self._next + 1\n"
                "        self._counts[block] = 1\n"
                "        self._free.remove(block)\n"
            ),
        ),
        (START, START + "        self._next = 0\n"),
    ),
    Mistake(
        "value_error_where_none_is_free", "9.1", "OutOfBlocksError", (NONE_FREE, "            raise ValueError()\n")
    ),
    Mistake("minus_one_where_none_is_free", "9.1", "was accepted", (NONE_FREE, "            return -1\n")),
    Mistake(
        "allocators_share_their_counts",
        "9.1",
        "was wanted",
        (
            START,
            (
                "        self._counts = _COUNTS.setdefault(num_blocks, [0] * num_blocks)\n"
                "        self._free = list(range(num_blocks))\n"
            ),
        ),
        ("class BlockAllocator:\n", "_COUNTS: dict[int, list[int]] = {}\n\n\nclass BlockAllocator:\n"),
    ),
    Mistake(
        "failed_allocate_changes_counts",
        "9.1",
        "it has changed the counts",
        (NONE_FREE, "            self._counts[-1] += 1\n" + NONE_FREE),
    ),
    Mistake(
        "numbers_from_1",
        "9.1",
        "a number from 0",
        (START, START.replace("list(range(num_blocks))", "list(range(1, num_blocks + 1))")),
        ("[0] * num_blocks\n", "[0] * (num_blocks + 1)\n"),
    ),
    Mistake(
        "counts_in_a_byte",
        "9.1",
        "share number 256",
        (START, START.replace("[0] * num_blocks", "torch.zeros(num_blocks, dtype=torch.uint8)")),
        ("        return self._counts[block]\n", "        return int(self._counts[block])\n"),
        only=True,
    ),
]
