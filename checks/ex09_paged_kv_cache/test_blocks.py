"""The block allocator (9.1)."""

from typing import Any

import torch

from harness.testing import Subject, refuses, requirement


def counts(allocator: Any, num_blocks: int) -> tuple[int, list[int]]:
    """What can be seen of an allocator."""
    return allocator.num_free, [allocator.ref_count(block) for block in range(num_blocks)]


def taken(allocator: Any, num_blocks: int, before: set[int], what: str) -> int:
    """A block from allocate, which was free."""
    block = allocator.allocate()
    assert isinstance(block, int) and 0 <= block < num_blocks, (
        f"{what}: {block!r} came, a number from 0 to {num_blocks - 1} was wanted"
    )
    assert block not in before, f"{what}: block {block} came, which is in use; {sorted(before)} are"
    return block


@requirement("9.1")
def test_every_block_is_handed_out_once(subject: Subject) -> None:
    """As many blocks as there are, each with count 1, then OutOfBlocksError."""
    for num_blocks in (5, 1):
        handed_out(subject, num_blocks)


def handed_out(subject: Subject, num_blocks: int) -> None:
    allocator = subject.BlockAllocator(num_blocks)
    assert counts(allocator, num_blocks) == (num_blocks, [0] * num_blocks), (
        f"BlockAllocator({num_blocks}): (num_free, counts) {counts(allocator, num_blocks)} came, all free was wanted"
    )
    used: set[int] = set()
    for number in range(num_blocks):
        used.add(taken(allocator, num_blocks, used, f"BlockAllocator({num_blocks}), allocate number {number}"))
        came = counts(allocator, num_blocks)
        wanted = num_blocks - len(used), [int(block in used) for block in range(num_blocks)]
        assert came == wanted, f"(num_free, counts) after allocate number {number}: {came} came, {wanted} was wanted"

    what = f"allocate with all {num_blocks} block(s) in use"
    refuses(subject.OutOfBlocksError, allocator.allocate, what)
    assert counts(allocator, num_blocks) == (0, [1] * num_blocks), f"{what}: it has changed the counts, and raised"


@requirement("9.1")
def test_a_block_is_free_once_nobody_holds_it(subject: Subject) -> None:
    """share counts up and free counts down; only at 0 is the block handed out again."""
    allocator = subject.BlockAllocator(1)
    block = allocator.allocate()
    for call, wanted in (("share", 2), ("share", 3), ("free", 2), ("free", 1), ("share", 2), ("free", 1), ("free", 0)):
        getattr(allocator, call)(block)
        came, free = allocator.ref_count(block), allocator.num_free
        assert came == wanted, f"ref_count after {call}({block}): {came} came, {wanted} was wanted"
        assert free == (wanted == 0), (
            f"num_free after {call}({block}), whose count is {wanted}: {free} came, {int(wanted == 0)} was wanted"
        )
        if wanted:
            refuses(subject.OutOfBlocksError, allocator.allocate, f"allocate while the only block has count {wanted}")
    again = allocator.allocate()
    assert again == block, f"allocate after the only block was freed: {again!r} came, {block} was wanted"
    assert allocator.ref_count(block) == 1, (
        f"ref_count of a block that was handed out again: {allocator.ref_count(block)} came, 1 was wanted"
    )


@requirement("9.1")
def test_a_block_has_any_number_of_holders(subject: Subject) -> None:
    """Hundreds may begin alike: a count is no small number."""
    allocator = subject.BlockAllocator(2)
    block = allocator.allocate()
    for number in range(1, 301):
        try:
            allocator.share(block)
        except ValueError as error:
            fact = f"share number {number} of a block in use: {error!r} came; a count has no largest number"
            raise AssertionError(fact) from error
    came = allocator.ref_count(block), allocator.num_free
    assert came == (301, 1), f"(ref_count, num_free) after share of a block, 300 times: {came} came, (301, 1) is right"
    for _ in range(300):
        allocator.free(block)
    came = allocator.ref_count(block), allocator.num_free
    assert came == (1, 1), f"(ref_count, num_free) after free of it, 300 times: {came} came, (1, 1) is right"


@requirement("9.1")
def test_a_block_that_is_not_in_use_is_refused(subject: Subject) -> None:
    """ValueError names it, and nothing has changed, however often it is tried."""
    for call in ("free", "share"):
        allocator = subject.BlockAllocator(5)
        first = allocator.allocate()
        refused(allocator, call, next(block for block in range(5) if block != first), "that was never handed out")
        for _ in range(4):
            allocator.allocate()
        allocator.share(2)
        for block in (1, 2, 2, 3):
            allocator.free(block)
        # The first and the last one are in use, which -5 and -1 would mean in a list.
        for block, words in ((2, "that was freed"), (1, "that was freed"), (-1, "-1"), (-5, "-5, that is -num_blocks")):
            refused(allocator, call, block, words)
        refused(allocator, call, 5, "5, that is num_blocks")
        refused(allocator, call, 700, "700")
        held = {0, 4}
        for _ in range(3):
            held.add(taken(allocator, 5, held, f"allocate after {call} of blocks that are not in use"))


def refused(allocator: Any, call: str, block: int, words: str) -> None:
    """ValueError, twice, and no change."""
    before = counts(allocator, 5)
    for _ in range(2):
        refuses(ValueError, lambda: getattr(allocator, call)(block), f"{call} of block {words}", block)
        came = counts(allocator, 5)
        assert came == before, f"(num_free, counts) after {call} of block {words}: {came} came, {before} was wanted"


@requirement("9.1")
def test_blocks_in_any_order(subject: Subject) -> None:
    """Two allocators beside each other count apart, over many calls."""
    rng = torch.Generator().manual_seed(5)
    held = [dict.fromkeys(range(7), 0) for _ in range(2)]
    allocators = [subject.BlockAllocator(7) for _ in held]
    for call in range(90):
        which, block, act = (int(torch.randint(n, (1,), generator=rng)) for n in (2, 7, 4))
        allocator, known = allocators[which], held[which]
        used = {number for number, count in known.items() if count}
        what = f"call {call} of two allocators"
        if act <= 1 and len(used) < 7:
            known[taken(allocator, 7, used, f"{what}, allocate")] = 1
        elif act == 2 and block in used:
            allocator.share(block)
            known[block] += 1
        elif block in used:
            allocator.free(block)
            known[block] -= 1
        for one, counted in zip(allocators, held, strict=True):
            came = counts(one, 7)
            wanted = sum(not count for count in counted.values()), list(counted.values())
            assert came == wanted, f"{what}: (num_free, counts) {came} came, {wanted} was wanted"
