"""Wrong block tables (9.3)."""

from harness.model.bank import Mistake

COPIES = "        copies = count > 0 and length % self._block_size > 0 and self.allocator.ref_count(table[-1]) > 1\n"
NEEDED = "        needed = math.ceil((length + count) / self._block_size) - len(table) + copies\n"
TOO_FEW = "        if needed > self.allocator.num_free:\n"
ADDED = "        added = [self.allocator.allocate() for _ in range(needed)]\n"
POPPED = "            shared = table.pop()\n"
COPY = "            for pool in (self.keys, self.values):\n                pool[:, added[0]] = pool[:, shared]\n"
UNSHARED = "            self.allocator.free(shared)\n"
KEPT = "        self._tables[sequence], self._lengths[sequence] = table + added, length + count\n"
WRITE = "    @torch.no_grad()\n    def write("
SLOTS = "        slots = self._slots(sequence, start, start + len(k))\n"
INTO = "            pool[layer].flatten(0, 1)[slots] = new"
FORK = "        self._tables[child] = self._tables[parent][: math.ceil(length / self._block_size)]\n"
FORK_LENGTH = "        self._lengths[child] = length\n"
SHARES = "        for block in self._tables[child]:\n            self.allocator.share(block)\n"
FREE = "        for block in self._tables.pop(sequence):\n            self.allocator.free(block)\n"
FORGET = "        del self._lengths[sequence]\n"
TABLE = "        return list(self._tables.get(sequence, []))\n"
PLACE = "return [table[position // size] * size + position % size for position in range(start, stop)]"
STATE = "        self._tables: dict[int, list[int]] = {}\n        self._lengths: dict[int, int] = {}\n"
POOLS = "        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))\n"

MISTAKES = [
    Mistake("no_copy_on_write", "9.3", "a copy of", (COPIES, "        copies = False\n")),
    Mistake("copies_the_first_layer", "9.3", "layers [1, 2]", (COPY, COPY.replace("[:, ", "[0, "))),
    Mistake(
        "copies_the_keys_alone",
        "9.3",
        "values of sequence",
        (COPY, COPY.replace("(self.keys, self.values)", "(self.keys,)")),
    ),
    Mistake(
        "copies_one_slot_less",
        "9.3",
        "not what was written there",
        (
            COPY,
            COPY.replace(
                "pool[:, added[0]] = pool[:, shared]",
                (
                    "pool[:, added[0], : length % self._block_size - 1] = pool[:, shared, : length % "
                    "self._block_size - 1]"
                ),
            ),
        ),
    ),
    Mistake(
        "copies_full_blocks_too",
        "9.3",
        "blocks",
        (COPIES, COPIES.replace("length % self._block_size > 0", "length > 0")),
    ),
    Mistake(
        "moves_what_is_its_own",
        "9.3",
        "",
        (COPIES, COPIES.replace(" > 1\n", " > 0\n")),
    ),
    Mistake(
        "copies_for_nothing",
        "9.3",
        "count 0",
        (COPIES, COPIES.replace("count > 0", "count >= 0")),
        only=True,
    ),
    Mistake(
        "only_children_copy",
        "9.3",
        "its own by then",
        (COPIES, COPIES.replace("count > 0", "count > 0 and sequence in self._children")),
        (STATE, STATE + "        self._children: set[int] = set()\n"),
        (FORK_LENGTH, FORK_LENGTH + "        self._children.add(child)\n"),
        only=True,
    ),
    Mistake(
        "once_forked_always_copied",
        "9.3",
        "",
        (COPIES, COPIES.replace("self.allocator.ref_count(table[-1]) > 1", "table[-1] in self._forked")),
        (STATE, STATE + "        self._forked: set[int] = set()\n"),
        (SHARES, "        self._forked.update(self._tables[child])\n" + SHARES),
    ),
    Mistake("copied_block_stays_counted", "9.3", "num_free", (UNSHARED, "")),
    Mistake("append_half_done", "9.3", "after the error", (TOO_FEW, "        if False:\n")),
    Mistake(
        "copy_before_the_count",
        "9.3",
        "a copy and a block",
        (NEEDED, NEEDED.replace(" + copies", "")),
        (
            TOO_FEW,
            """        if copies:
            shared, own = table.pop(), self.allocator.allocate()
            for pool in (self.keys, self.values):
                pool[:, own] = pool[:, shared]
            self.allocator.free(shared)
            table.append(own)
            copies = False
"""
            + TOO_FEW,
        ),
    ),
    Mistake(
        "the_copy_is_not_needed",
        "9.3",
        "after the error",
        (TOO_FEW, "        if needed - copies > self.allocator.num_free:\n"),
        only=True,
    ),
    Mistake(
        "the_last_block_is_kept_back",
        "9.3",
        "your code raises",
        (TOO_FEW, "        if needed >= self.allocator.num_free > 0:\n"),
    ),
    Mistake(
        "as_many_as_there_are",
        "9.3",
        "was accepted",
        (TOO_FEW, "        if needed > self.allocator.num_free and count > 4:\n"),
        (ADDED, ("        added = [self.allocator.allocate() for _ in range(min(needed, self.allocator.num_free))]\n")),
        ("        if copies:\n", "        if copies and added:\n"),
    ),
    Mistake(
        "table_changed_before_the_error",
        "9.3",
        "after the error",
        (TOO_FEW, TOO_FEW + "            self._lengths[sequence] = length + count\n"),
    ),
    Mistake(
        "new_block_for_each_append",
        "9.3",
        "blocks",
        (NEEDED, "        needed = math.ceil(count / self._block_size) + copies\n"),
    ),
    Mistake(
        "one_block_more", "9.3", "blocks", (NEEDED, NEEDED.replace("(length + count) /", "(length + count + 1) /"))
    ),
    Mistake(
        "fork_takes_the_whole_table",
        "9.3",
        "blocks",
        (FORK, "        self._tables[child] = list(self._tables[parent])\n"),
    ),
    Mistake(
        "fork_drops_the_rest",
        "9.3",
        "block_table(1)",
        (FORK, FORK.replace("math.ceil(length / self._block_size)", "length // self._block_size")),
    ),
    Mistake(
        "fork_takes_the_parents_length",
        "9.3",
        "length(1)",
        (FORK_LENGTH, "        self._lengths[child] = self._lengths[parent]\n"),
    ),
    Mistake("fork_does_not_count", "9.3", "ref_count of the blocks", (SHARES, "")),
    Mistake(
        "one_list_for_both",
        "9.3",
        "",
        (
            FORK,
            FORK.replace("self._tables[parent][: math.ceil(length / self._block_size)]", "self._tables[parent]"),
        ),
        (
            FORK_LENGTH,
            (
                "        if length <= (len(self._tables[child]) - 1) * self._block_size:\n"
                "            self._tables[child] = self._tables[child][: math.ceil(length / "
                "self._block_size)]\n"
            )
            + FORK_LENGTH,
        ),
    ),
    Mistake(
        "fork_copies",
        "9.3",
        "",
        (
            FORK,
            """        self.append(child, length)
        for old, new in zip(self._tables[parent], self._tables[child], strict=False):
            for pool in (self.keys, self.values):
                pool[:, new] = pool[:, old]
""",
        ),
        (SHARES, ""),
    ),
    Mistake(
        "free_gives_back_for_all",
        "9.3",
        "",
        (
            FREE,
            (
                "        for block in self._tables.pop(sequence):\n"
                "            while self.allocator.ref_count(block):\n"
                "                self.allocator.free(block)\n"
            ),
        ),
    ),
    Mistake(
        "free_keeps_shared_blocks",
        "9.3",
        "num_free",
        (
            FREE,
            FREE.replace(
                "            self.allocator.free(block)",
                ("            if self.allocator.ref_count(block) == 1:\n                self.allocator.free(block)"),
            ),
        ),
    ),
    Mistake(
        "free_gives_back_one_block", "9.3", "num_free", (FREE, FREE.replace(".pop(sequence):", ".pop(sequence)[-1:]:"))
    ),
    Mistake("free_keeps_the_length", "9.3", "after free", (FORGET, "")),
    Mistake(
        "own_table_is_handed_out",
        "9.3",
        "block_table",
        (TABLE, "        return self._tables.get(sequence, [])\n"),
        only=True,
    ),
    Mistake(
        "caches_share_their_tables",
        "9.3",
        "",
        (STATE, "        self._tables = _TABLES\n        self._lengths: dict[int, int] = {}\n"),
        ("class PagedKVCache:\n", "_TABLES: dict[int, list[int]] = {}\n\n\nclass PagedKVCache:\n"),
    ),
    Mistake("keys_carry_a_graph", "9.3", "ask for gradients", (WRITE, "    def write("), only=True),
    Mistake(
        "write_from_the_beginning",
        "9.3",
        "differ",
        (SLOTS, "        slots = self._slots(sequence, 0, len(k))\n"),
        only=True,
    ),
    Mistake("write_to_the_first_layer", "9.3", "differ", (INTO, INTO.replace("pool[layer]", "pool[0]")), only=True),
    Mistake(
        "blocks_side_by_side",
        "9.3",
        "",
        (
            SLOTS,
            (
                "        first = self._slots(sequence, start, start + 1)[0]\n"
                "        slots = [slot % (len(self.keys[0]) * self._block_size) for slot in "
                "range(first, first + len(k))]\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "values_for_keys",
        "9.3",
        "differ",
        ("((self.keys, k), (self.values, v))", "((self.keys, v), (self.values, k))"),
        only=True,
    ),
    Mistake(
        "pool_never_in_bfloat16",
        "9.3",
        "bfloat16",
        (POOLS, POOLS.replace("dtype=dtype", "dtype=torch.float32 if dtype == torch.bfloat16 else dtype")),
    ),
    Mistake("always_on_the_cpu", "9.3", "meta", (POOLS, POOLS.replace("device=device", 'device="cpu"')), only=True),
    Mistake(
        "values_are_the_keys",
        "9.3",
        "",
        (
            POOLS,
            ("        self.keys = torch.zeros(shape, dtype=dtype, device=device)\n        self.values = self.keys\n"),
        ),
    ),
    Mistake(
        "grandchildren_write_in_place",
        "9.3",
        "four forks",
        (COPIES, COPIES.replace("> 1\n", "in (2, 3)\n")),
        only=True,
    ),
    Mistake(
        "whole_blocks_with_a_graph",
        "9.3",
        "ask for gradients after write of 4 tokens",
        (WRITE, "    def write("),
        (
            SLOTS,
            """        if len(k) == self._block_size and not start % self._block_size:
            block = self._tables[sequence][start // self._block_size]
            self.keys[layer, block], self.values[layer, block] = k, v
            return
        k, v = k.detach(), v.detach()
"""
            + SLOTS,
        ),
        only=True,
    ),
]
