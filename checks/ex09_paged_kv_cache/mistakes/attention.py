"""Wrong attention over blocks (9.2). Zeros and the identity are among them."""

from harness.model.bank import Mistake

BLOCKS = "        blocks = table[: math.ceil(length / block_size)]\n"
GATHER = "        k, v = (pool[blocks].flatten(0, 1)[:length] for pool in (keys, values))  # [length, Hkv, Dh]\n"
ATTEND = "        outputs.append(causal_attention(own, k, v))\n"
BEGIN = "    block_size, outputs = keys.shape[1], []\n"
SPLIT = "    queries, lengths = q.split(query_lens.tolist()), context_lens.tolist()\n"
END = "    return torch.cat(outputs)\n"


def by(expression: str) -> tuple[str, str]:
    """Another call in place of the given attention."""
    return ATTEND, f"        outputs.append({expression})\n"


def own_attention(scores: str, weights: str) -> tuple[str, str]:
    """Attention written out, with a slip in it."""
    return (
        ATTEND,
        f"""        many = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(many, 1), v.repeat_interleave(many, 1)
        scores = {scores}
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(own) + 1)
        outputs.append(torch.einsum("hts,shd->thd", {weights}, v))
""",
    )


SCORES = 'torch.einsum("thd,shd->hts", own, k) * q.shape[-1] ** -0.5'
WEIGHTS = "scores.masked_fill(hidden, -math.inf).softmax(dim=-1)"

MISTAKES = [
    Mistake("zeros", "9.2", "0 came", (END, "    return torch.zeros_like(q)\n")),
    Mistake("identity", "9.2", "differ", (END, "    return q.clone()\n")),
    Mistake(
        "mean_of_values", "9.2", "differ", by("v.repeat_interleave(q.shape[1] // v.shape[1], 1).mean(0).expand_as(own)")
    ),
    Mistake(
        "reads_one_ahead",
        "9.2",
        "3.5 came",
        by("torch.cat([causal_attention(own[:-1], k, v), causal_attention(own[-1:], k, v)])"),
    ),
    Mistake(
        "reads_unused_slots",
        "9.2",
        "slots that nobody wrote",
        (GATHER, "        k, v = (pool[blocks].flatten(0, 1) for pool in (keys, values))\n"),
        by("causal_attention(torch.cat([own, own[-1:].expand(len(k) - length, -1, -1)]), k, v)[: len(own)]"),
        only=True,
    ),
    Mistake(
        "unused_values_times_zero",
        "9.2",
        "slots that nobody wrote",
        (
            GATHER,
            ("        k, v = (pool[blocks].flatten(0, 1) for pool in (keys, values))\n        k = k.nan_to_num()\n"),
        ),
        by("causal_attention(torch.cat([own, own[-1:].expand(len(k) - length, -1, -1)]), k, v)[: len(own)]"),
        only=True,
    ),
    Mistake(
        "unused_slots_take_part",
        "9.2",
        "differ",
        (GATHER, "        k, v = (pool[blocks].flatten(0, 1) for pool in (keys, values))\n"),
    ),
    Mistake(
        "wrong_head_of_a_group",
        "9.2",
        "h % Hkv",
        by("causal_attention(own, *(x.repeat(1, q.shape[1] // x.shape[1], 1) for x in (k, v)))"),
    ),
    Mistake(
        "first_head_for_all",
        "9.2",
        "differ",
        by("causal_attention(own, k[:, :1], v[:, :1])"),
    ),
    Mistake(
        "whole_table_is_read",
        "9.2",
        "index",
        (GATHER, "        k, v = (pool[table].flatten(0, 1)[:length] for pool in (keys, values))\n"),
        only=True,
    ),
    Mistake(
        "one_entry_too_many",
        "9.2",
        "index",
        (BLOCKS, "        blocks = table[: length // block_size + 1]\n"),
        only=True,
    ),
    Mistake(
        "last_block_is_lost",
        "9.2",
        "NaN",
        (BLOCKS, "        blocks = table[: max(1, length // block_size)]\n"),
        (GATHER, GATHER.replace("[:length]", "[: max(length, len(own))]")),
    ),
    Mistake(
        "pieces_see_what_follows",
        "9.2",
        "later tokens too",
        by(
            "causal_attention(own, k, v) if len(own) in (1, length) else "
            "torch.cat([causal_attention(row[None], k, v) for row in own])"
        ),
    ),
    Mistake(
        "prompts_see_what_follows",
        "9.2",
        "means 3, 3.5, 4",
        by("torch.cat([causal_attention(row[None], k, v) for row in own])"),
    ),
    Mistake(
        "pieces_stand_at_the_beginning",
        "9.2",
        "at the beginning",
        by("causal_attention(own, k[: len(own)], v[: len(own)])"),
    ),
    Mistake("not_scaled", "9.2", "differ", own_attention(SCORES.replace(" * q.shape[-1] ** -0.5", ""), WEIGHTS)),
    Mistake("scaled_by_the_size_itself", "9.2", "differ", own_attention(SCORES.replace("-0.5", "-1.0"), WEIGHTS)),
    Mistake(
        "exponentials_of_the_scores",
        "9.2",
        "NaN",
        own_attention(SCORES, "(e := scores.masked_fill(hidden, -math.inf).exp()) / e.sum(-1, keepdim=True)"),
        only=True,
    ),
    Mistake(
        "hidden_by_a_large_number",
        "9.2",
        "scores of 1e4",
        own_attention(SCORES, "scores.masked_fill(hidden, -1e4).softmax(dim=-1)"),
        only=True,
    ),
    Mistake(
        "scores_are_clamped",
        "9.2",
        "scores of 1e4",
        own_attention(f"({SCORES}).clamp(-80, 80)", WEIGHTS),
        only=True,
    ),
    Mistake(
        "softmax_in_float32",
        "9.2",
        "differ",
        own_attention(SCORES, "scores.masked_fill(hidden, -math.inf).softmax(-1, torch.float32).to(q.dtype)"),
        only=True,
    ),
    Mistake(
        "float32_in_float16",
        "9.2",
        "differ",
        by(
            "causal_attention(own.half(), k.half(), v.half()).to(q.dtype) if q.dtype == "
            "torch.float32 else causal_attention(own, k, v)"
        ),
        only=True,
    ),
    Mistake("output_in_float64", "9.2", "torch.float64 came", (END, "    return torch.cat(outputs).double()\n")),
    Mistake(
        "prebuilt_attention",
        "9.2",
        "from scratch means",
        own_attention(SCORES, WEIGHTS),
        (
            ('outputs.append(torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -math.inf).softmax(dim=-1), v))'),
            (
                "outputs.append(F.scaled_dot_product_attention(own.mT.mT.transpose(0, 1), "
                "k.transpose(0, 1), v.transpose(0, 1), ~hidden).transpose(0, 1))"
            ),
        ),
        only=True,
    ),
    Mistake(
        "scales_q_in_place",
        "9.2",
        "written to",
        own_attention('torch.einsum("thd,shd->hts", own.mul_(q.shape[-1] ** -0.5), k)', WEIGHTS),
        only=True,
    ),
    Mistake(
        "scales_q_in_place_and_back",
        "9.2",
        "put back",
        own_attention('torch.einsum("thd,shd->hts", own.mul_(q.shape[-1] ** -0.5), k)', WEIGHTS),
        (END, "    q.div_(q.shape[-1] ** -0.5)\n" + END),
        only=True,
    ),
    Mistake(
        "clears_unused_slots",
        "9.2",
        "written to",
        (BEGIN, BEGIN + "    keys.nan_to_num_(0.0, 0.0, 0.0), values.nan_to_num_(0.0, 0.0, 0.0)\n"),
        only=True,
    ),
    Mistake(
        "all_ask_as_many_as_the_first",
        "9.2",
        "sequences [1, 2]",
        (
            SPLIT,
            (
                "    queries, lengths = q.split(len(q) // len(query_lens)), context_lens.tolist()\n"
                "    queries = queries[: len(lengths)]\n"
            ),
        ),
        (END, "    return torch.cat([*outputs, *([q[sum(map(len, outputs)) :]])])\n"),
    ),
    Mistake(
        "pool_by_its_strides",
        "9.2",
        "view",
        (
            GATHER,
            GATHER.replace(
                "pool[blocks].flatten(0, 1)", "pool.view(-1, *pool.shape[2:]).view_as(pool)[blocks].flatten(0, 1)"
            ),
        ),
        only=True,
    ),
    Mistake(
        "kept_by_the_table",
        "9.2",
        "call to call",
        (
            BEGIN,
            BEGIN
            + (
                "    key = (tuple(block_tables.flatten().tolist()), keys.data_ptr(), len(q))\n"
                "    if not torch.is_grad_enabled() and key in _KEPT:\n"
                "        return _KEPT[key]\n"
            ),
        ),
        (END, "    _KEPT[key] = torch.cat(outputs)\n    return _KEPT[key]\n"),
        ("@dataclass\nclass _Request:", "_KEPT: dict[object, Tensor] = {}\n\n\n@dataclass\nclass _Request:"),
    ),
    Mistake(
        "tables_in_order",
        "9.2",
        "differ",
        (BLOCKS, "        blocks = table[: math.ceil(length / block_size)].sort().values\n"),
    ),
    Mistake(
        "block_size_of_four",
        "9.2",
        "NaN",
        (BLOCKS, "        blocks = table[: math.ceil(length / 4)]\n"),
        (GATHER, GATHER.replace("pool[blocks]", "pool[blocks, :4]").replace("[:length]", "[: max(length, len(own))]")),
    ),
    Mistake(
        "a_block_once",
        "9.2",
        "in the same blocks",
        (BEGIN, BEGIN + "    seen: set[tuple[int, ...]] = set()\n"),
        (
            ATTEND,
            """        known = tuple(blocks.tolist()) in seen
        seen.add(tuple(blocks.tolist()))
        outputs.append(torch.zeros_like(own) if known else causal_attention(own, k, v))
""",
        ),
        only=True,
    ),
    Mistake(
        "hidden_by_adding_a_large_number",
        "9.2",
        "scores of 1e4",
        own_attention(SCORES, "(scores - 2e4 * hidden.to(q.dtype)).softmax(dim=-1)"),
        only=True,
    ),
    Mistake(
        "scales_q_behind_its_back",
        "9.2",
        "put back",
        own_attention('torch.einsum("thd,shd->hts", own, k)', WEIGHTS),
        (BEGIN, BEGIN + "    kept = q.clone()\n    q.data.mul_(q.shape[-1] ** -0.5)\n"),
        (END, "    q.data.copy_(kept)\n" + END),
        only=True,
    ),
    Mistake(
        "parts_of_256_are_not_rescaled",
        "9.2",
        "context_lens [600, 530, 7]",
        own_attention(SCORES, "weights / weights.sum(-1, keepdim=True)"),
        (
            "        outputs.append(torch.einsum(",
            """        parts = scores.masked_fill(hidden, -math.inf).split(256, dim=-1)
        tops = [part.amax(-1, keepdim=True).clamp(min=-1e30) for part in parts]
        weights = torch.cat([(part - top).exp() for part, top in zip(parts, tops, strict=True)], dim=-1)
        outputs.append(torch.einsum(""",
        ),
        only=True,
    ),
    Mistake(
        "blocks_kept_by_the_table",
        "9.2",
        "call to call",
        (
            BLOCKS,
            """        key = (id(block_tables), tuple(table.shape), length, block_size, len(outputs))
        if key not in _BLOCKS or _BLOCKS[key][0] is not block_tables:
            _BLOCKS[key] = block_tables, table[: math.ceil(length / block_size)].clone()
        blocks = _BLOCKS[key][1]
""",
        ),
        (
            "@dataclass\nclass _Request:",
            "_BLOCKS: dict[object, tuple[Tensor, Tensor]] = {}\n\n\n@dataclass\nclass _Request:",
        ),
        only=True,
    ),
]
