"""Block tables, fork and copy on write (9.3)."""

from itertools import product

import torch

from harness.testing import Close, Subject, is_tensor, refuses, requirement

from .tables import DIM, KV_HEADS, LAYERS, Known, state


@requirement("9.3")
def test_tables_by_hand(subject: Subject, close: Close) -> None:
    """Three blocks of two slots: fork shares both, the child's append copies the half-full one."""
    known = Known(subject, 3, 2)
    known.add(0, 3)
    known.holds(close, "append(0, 3)")
    a, b = known.cache.block_table(0)

    known.fork(0, 1, 3)
    assert known.cache.block_table(1) == [a, b], (
        f"block_table(1) after fork(0, 1, 3): {known.cache.block_table(1)} came, the parent's {[a, b]} was wanted"
    )
    counts = [known.cache.allocator.ref_count(block) for block in (a, b)]
    assert counts == [2, 2], f"ref_count of the blocks after fork: {counts} came, [2, 2] was wanted"
    known.add(1, 1)
    known.holds(close, "append(1, 1), of a half-full block that 0 holds too")
    table = known.cache.block_table(1)
    assert table[0] == a and table[1] != b, f"block_table(1) after append(1, 1): {table} came, {a} and a copy of {b}"
    known.add(0, 1)
    known.holds(close, "append(0, 1), whose block is its own by now")
    table = known.cache.block_table(0)
    assert table == [a, b], f"block_table(0) after append(0, 1): {table} came, {[a, b]} was wanted: b is its own"


@requirement("9.3")
def test_slots_take_blocks(subject: Subject, close: Close) -> None:
    """n slots take ceil(n / block_size) blocks, however they are asked for; unknown sequences have none."""
    for block_size in (3, 1):
        taken(subject, close, block_size)


def taken(subject: Subject, close: Close, block_size: int) -> None:
    known = Known(subject, 14, block_size)
    for sequence in (0, 7):
        came = known.cache.length(sequence), known.cache.block_table(sequence)
        assert came == (0, []), f"length and block_table of an unknown sequence: {came} came, (0, []) was wanted"
    for sequence, count in ((7, 1), (0, 4), (7, 0), (7, 2), (0, 0), (3, 0), (7, 1)):
        known.add(sequence, count)
        known.holds(close, f"append({sequence}, {count})")
    known.free(7)
    known.holds(close, "free(7)")
    came = known.cache.length(7), known.cache.block_table(7)
    assert came == (0, []), f"length and block_table after free: {came} came, (0, []) was wanted"
    known.add(7, 2)
    known.holds(close, "append(7, 2), a sequence that was freed and is new again")


@requirement("9.3")
def test_the_pool(subject: Subject) -> None:
    """keys and values have the cache's sizes, dtype and device, and ask for no gradients."""
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "meta")):
        options = {} if dtype == torch.float32 else {"dtype": dtype, "device": device}
        cache = subject.PagedKVCache(3, 5, 4, 2, 7, **options)
        for name in ("keys", "values"):
            pool = is_tensor(getattr(cache, name), f"PagedKVCache(3, 5, 4, 2, 7).{name}")
            came = tuple(pool.shape), pool.dtype, pool.device.type
            wanted = (3, 5, 4, 2, 7), dtype, device
            assert came == wanted, f"PagedKVCache(3, 5, 4, 2, 7).{name}: {came} came, {wanted} was wanted"
            assert not pool.requires_grad, f"PagedKVCache(3, 5, 4, 2, 7).{name} asks for gradients"
        free = cache.allocator.num_free
        assert free == 5, f"PagedKVCache(3, 5, 4, 2, 7).allocator.num_free: {free} came, 5 was wanted"


@requirement("9.3")
def test_write_in_pieces(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Pieces of any strides go to their positions of their layer, and carry no graph."""
    cache = subject.PagedKVCache(LAYERS, 6, 4, KV_HEADS, DIM, dtype=torch.float64)
    cache.append(4, 3)
    cache.append(2, 13)
    zeros = torch.zeros(3, KV_HEADS, DIM, dtype=torch.float64)
    cache.write(0, 4, 0, zeros, zeros)
    k = torch.randn(LAYERS, DIM, 13, KV_HEADS, generator=rng, dtype=torch.float64, requires_grad=True)
    k = k.permute(0, 2, 3, 1)  # [layers, tokens, Hkv, Dh]
    v = torch.randn(LAYERS, 1, KV_HEADS, 1, generator=rng, dtype=torch.float64, requires_grad=True)
    v = v.expand(LAYERS, 13, KV_HEADS, DIM)
    for layer in range(LAYERS):
        for start, stop in ((5, 8), (0, 1), (1, 5), (8, 12), (12, 13)):
            cache.write(layer, 2, start, k[layer, start:stop], v[layer, start:stop])
            for name in ("keys", "values"):
                asks = getattr(cache, name).requires_grad
                assert not asks, f"{name} ask for gradients after write of {stop - start} tokens that do, from {start}"
    table = torch.tensor(cache.block_table(2))
    for name, wanted in (("keys", k), ("values", v)):
        came = getattr(cache, name)[:, table].flatten(1, 2)[:, :13]
        close(came, wanted.detach(), f"{name} after write in pieces: [layers, positions, Hkv, Dh]")
    first = cache.keys[0, cache.block_table(4)[0], :3]
    assert not first.any(), "write to sequence 2 has written to the slots of sequence 4"


ORDERS = {
    "the child appends first": ("child", "parent"),
    "the parent appends first": ("parent", "child"),
    "the parent is freed first": ("free parent", "child"),
    "the child is freed first": ("free child", "parent"),
}


@requirement("9.3")
def test_parent_and_child_are_equals(subject: Subject, close: Close) -> None:
    """Each sees its own tokens whoever goes on first; nobody's blocks are lost, and what is one's own stays."""
    for order, length in product(ORDERS, (6, 1, 4, 5)):
        go_on(subject, close, order, length)


def go_on(subject: Subject, close: Close, order: str, length: int) -> None:
    known = Known(subject, 8, 4)
    known.add(0, 6)
    known.fork(0, 1, length)
    call = f"append(0, 6), fork(0, 1, {length})"
    known.holds(close, call)
    for act in ORDERS[order]:
        sequence, tables = (
            ("parent", "child").index(act.split()[-1]),
            {s: known.cache.block_table(s) for s in known.rows},
        )
        call += f", {act}"
        if act.startswith("free"):
            known.free(sequence)
        else:
            known.add(sequence, 3)
        known.holds(close, call)
        others = {s: known.cache.block_table(s) for s in known.rows if s != sequence}
        moved = [s for s, table in others.items() if table != tables[s]]
        assert not moved, f"block_table({moved}) after {call}: the blocks of another sequence have moved"
        stay = tables[sequence] if len(known.rows) == 1 else tables[sequence][: len(known.rows[1 - sequence]) // 4]
        now = known.cache.block_table(sequence)
        if not act.startswith("free") and len(known.rows) == 1:
            assert now[: len(stay)] == stay, f"block_table({sequence}) after {call}: a block that is its own has moved"
    for sequence in list(known.rows):
        known.free(sequence)
    known.holds(close, f"{call}, then free of all")


@requirement("9.3")
def test_full_blocks_stay_shared(subject: Subject, close: Close) -> None:
    """A fork at a block's end costs nothing but the new blocks of who appends."""
    known = Known(subject, 6, 4)
    known.add(0, 8)
    known.fork(0, 1, 8)
    known.fork(0, 2, 4)
    for sequence in (1, 2, 0):
        known.add(sequence, 1)
        known.holds(close, f"append({sequence}, 1) after fork at a block's end")
    tables = [known.cache.block_table(sequence) for sequence in (0, 1, 2)]
    assert tables[0][:2] == tables[1][:2] and tables[0][:1] == tables[2][:1], (
        f"block tables of a parent and its forks at blocks' ends: {tables} came; full blocks stay shared"
    )


@requirement("9.3")
def test_forks_of_forks(subject: Subject, close: Close) -> None:
    """Four that share a half-full block: all but the last to append get a copy of their own."""
    known = Known(subject, 7, 4)
    known.add(0, 6)
    known.fork(0, 1, 6)
    known.fork(1, 2, 5)
    known.fork(2, 3, 5)
    first = known.cache.block_table(0)
    for sequence in (1, 3, 0, 2):
        known.add(sequence, 1)
        known.holds(close, f"append({sequence}, 1), of four forks that share a half-full block")
    last = known.cache.block_table(2)
    assert last == first, f"block_table(2), the last to append: {last} came, {first} was wanted, its own by then"
    for sequence in (0, 1, 2, 3):
        known.free(sequence)
        known.holds(close, f"free({sequence}), of four forks")


@requirement("9.3")
def test_fork_copies_nothing(subject: Subject, close: Close) -> None:
    """A fork takes no block where none is free, and writes nothing."""
    known = Known(subject, 2, 4)
    known.add(0, 6)
    versions = known.cache.keys._version, known.cache.values._version

    known.fork(0, 1, 6)

    now = known.cache.keys._version, known.cache.values._version
    assert now == versions, "fork has written to keys or values"
    known.holds(close, "fork(0, 1, 6) with no block free")


SHORT: tuple[tuple[str, list[tuple[int, ...]], int, int], ...] = (
    ("a new sequence", [(0, 7)], 1, 5),
    ("a sequence that has room for some of them", [(0, 7), (1, 1)], 1, 4),
    ("a copy and a block, one is free", [(0, 7), (1, 0, 7)], 1, 2),
    ("a copy, none is free", [(0, 7), (1, 0, 7), (2, 4)], 0, 1),
)


@requirement("9.3")
def test_all_or_nothing(subject: Subject, close: Close) -> None:
    """After OutOfBlocksError tables, counts and contents are as before, and smaller requests still work."""
    for what, before, sequence, count in SHORT:
        all_or_nothing(subject, close, what, before, sequence, count)


def all_or_nothing(
    subject: Subject, close: Close, what: str, before: list[tuple[int, ...]], sequence: int, count: int
) -> None:
    known = Known(subject, 3, 4)
    for one, *rest in before:
        if len(rest) == 2:
            known.fork(rest[0], one, rest[1])
        else:
            known.add(one, rest[0])
    seen, pools = state(known), (known.cache.keys.clone(), known.cache.values.clone())

    for _ in range(2):
        call = f"append({sequence}, {count}): {what}; 3 blocks of 4 slots"
        refuses(subject.OutOfBlocksError, lambda: known.cache.append(sequence, count), call)

        now = state(known)
        assert now == seen, f"{call}: (tables, lengths, counts, num_free) were {seen}, after the error they are {now}"
        held = zip(pools, (known.cache.keys, known.cache.values), strict=True)
        same = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in held]  # Slots that nobody wrote may hold NaN.
        assert all(same), f"{call}: keys or values have changed, although it raised"
    for one in [one for one in known.rows if one != sequence]:
        known.free(one)
    known.add(sequence, 1)
    known.holds(close, f"append({sequence}, 1) once all others are freed")


@requirement("9.3")
def test_append_of_nothing(subject: Subject, close: Close) -> None:
    """A count of 0 takes no block and copies none, also where the last block is shared or no block is free."""
    known = Known(subject, 2, 4)
    known.add(0, 6)
    known.fork(0, 1, 6)
    before = state(known)
    for sequence in (1, 0, 3):
        known.cache.append(sequence, 0)
        now = state(known)
        assert now == before, f"append({sequence}, 0): (tables, lengths, counts, num_free) {before} has become {now}"


@requirement("9.3")
def test_the_table_is_a_copy(subject: Subject) -> None:
    """The caller may change the list that block_table returned; caches beside each other share nothing."""
    known, other = Known(subject, 4, 2), Known(subject, 4, 2)
    known.add(0, 3)
    known.fork(0, 1, 3)
    before = known.cache.block_table(0)
    for sequence in (0, 1):
        known.cache.block_table(sequence).append(99)
        known.cache.block_table(sequence)[0] = 98
    for sequence in (0, 1):
        came = known.cache.block_table(sequence)
        assert came == before, f"block_table({sequence}) after the caller has changed what it returned: {came} came"
    assert state(other)[-1] == 4 and not other.cache.block_table(0), "a second cache has sequences of the first"
    assert other.cache.keys.data_ptr() != known.cache.keys.data_ptr(), "two caches share one pool"
