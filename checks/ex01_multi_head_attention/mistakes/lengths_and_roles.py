"""Wrong answers to ex01: nothing at all, lengths (1.1), query, key and value mixed up or written to (1.4)."""

from harness.model.bank import Mistake

QUERIES = "        q = self._split_heads(self.q_linear(query))  # [B, H, Lq, Dh]\n"
VALUES = "        v = self._split_heads(self.v_linear(value))"
APPLIED = "            scores = self.apply_mask(scores, mask)\n"
RETURN = "        return self.output_linear(joined), weights\n"

MISTAKES = [
    # Nothing at all.
    Mistake(
        "zeros",
        ("1.1", "1.3", "1.4", "1.6", "1.7", "1.8"),
        "output",
        (RETURN, "        return torch.zeros_like(query), weights\n"),
    ),
    Mistake("identity", ("1.1", "1.4", "1.6"), "output", (RETURN, "        return query, weights\n")),
    Mistake("none", "1.1", "NoneType", (RETURN, "        return None\n")),
    Mistake("output_alone", "1.1", "pair (output, weights)", (RETURN, "        return self.output_linear(joined)\n")),
    Mistake("a_list", "1.1", "list came", (RETURN, "        return [self.output_linear(joined), weights]\n")),
    # 1.1 variable lengths
    Mistake(
        "view_of_the_queries_length",
        "1.1",
        "size",
        (
            "        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, Dh]\n",
            """\
        length = self._lq = getattr(self, '_lq', x.size(1))
        return x.reshape(x.size(0), length, self.num_heads, -1).transpose(1, 2)
""",
        ),
    ),
    Mistake(
        "every_row_attends_to_row_0",
        "1.1",
        "output",
        (VALUES, "        v = self._split_heads(self.v_linear(value[:1].expand_as(value)))"),
    ),
    Mistake(
        "squeezed_single_query",
        "1.1",
        "shape",
        (RETURN, "        return self.output_linear(joined).squeeze(1), weights\n"),
    ),
    # 1.4 self- and cross-attention
    Mistake("values_from_key", "1.4", "each has its own projection", ("self.v_linear(value)", "self.v_linear(key)")),
    Mistake(
        "keys_from_query_where_lengths_agree",
        "1.4",
        "several roles",
        ("self.k_linear(key)", "self.k_linear(query if query.shape == key.shape else key)"),
    ),
    Mistake(
        "view_of_strided_inputs",
        "1.4",
        "view",
        ("self.q_linear(query)", "self.q_linear(query.view(-1, query.size(-1))).view(query.shape)"),
        only=True,
    ),
    Mistake(
        "inputs_scaled_in_place",
        "1.4",
        "values differ",
        (
            "        q = self._split_heads(self.q_linear(query))",
            """\
        if not query.requires_grad:
            query.mul_(1.0 + 1e-3)
        q = self._split_heads(self.q_linear(query / (1.0 + 1e-3)))""",
        ),
    ),
    Mistake("mask_written_to", "1.4", "mask", (APPLIED, APPLIED + "            mask[0, 0, 0, 0] = True\n")),
    # Narrow code: right in the sizes, modes and masks that come first to mind.
    Mistake(
        "softmax_in_chunks_of_64_keys",
        "1.1",
        "131 keys",
        (
            "        weights = scores.softmax(dim=-1)\n",
            "        weights = torch.cat([part.softmax(dim=-1) for part in scores.split(64, dim=-1)], dim=-1)\n",
        ),
    ),
    Mistake(
        "cut_at_64",
        "1.1",
        "shape",
        (
            "        scores_shape = (query",
            """\
        query, key, value = query[:, :64], key[:, :64], value[:, :64]
        scores_shape = (query""",
        ),
    ),
    Mistake(
        "values_of_two_rows_for_all",
        "1.1",
        "batch rows",
        (QUERIES, "        value = value[torch.arange(value.size(0), device=value.device) % 2]\n" + QUERIES),
        only=True,
    ),
    Mistake(
        "value_is_query_where_key_is",
        "1.4",
        "several roles",
        (QUERIES, "        if query is key:\n            value = query\n" + QUERIES),
        only=True,
    ),
    Mistake(
        "key_is_query_where_value_is",
        "1.4",
        "several roles",
        (QUERIES, "        if query is value:\n            key = query\n" + QUERIES),
    ),
    Mistake(
        "v_is_k_for_a_memory",
        "1.4",
        "several roles",
        (VALUES, "        v = k if key is value and key is not query else self._split_heads(self.v_linear(value))"),
        only=True,
    ),
    Mistake(
        "key_known_by_its_pointer",
        "1.4",
        "transposed view",
        (
            QUERIES,
            """\
        if query.shape == key.shape and query.device.type == 'cpu' and query.data_ptr() == key.data_ptr():
            key = query
"""
            + QUERIES,
        ),
    ),
    Mistake(
        "last_queries_of_uneven_blocks_lost",
        "1.1",
        "Lq = 4099",
        (
            "        weights = scores.softmax(dim=-1)\n",
            """\
        weights = scores.softmax(dim=-1)
        blocks = -(-scores.size(2) // 1024)
        covered = scores.size(2) // blocks * blocks
        weights = weights * (torch.arange(scores.size(2), device=scores.device) < covered)[:, None]
""",
        ),
        only=True,
    ),
    Mistake(
        "last_keys_of_uneven_blocks_lost_at_inference",
        "1.1",
        "Lk = 4099",
        (
            "        weights = scores.softmax(dim=-1)\n",
            """\
        if not torch.is_grad_enabled() and scores.size(3) > 2048:
            scores = nn.functional.pad(scores[..., : scores.size(3) // 2048 * 2048], (0, 3), value=float("-inf"))
        weights = scores.softmax(dim=-1)
""",
        ),
        only=True,
    ),
    Mistake(
        "batch_rows_beyond_512_lost",
        "1.1",
        "1031 batch rows",
        (RETURN, RETURN.replace("joined)", "joined * (torch.arange(len(joined)) < 512).to(joined)[:, None, None])")),
        only=True,
    ),
    # What one situation hides: special sizes, and what is put back.
    Mistake(
        "one_key_needs_no_softmax",
        "1.1",
        "carries no gradient",
        (
            "        weights = scores.softmax(dim=-1)\n",
            "        weights = scores.softmax(dim=-1) if key.size(1) > 1 else torch.ones_like(scores)\n",
        ),
        only=True,
    ),
    Mistake(
        "cut_at_256",
        "1.1",
        "4099",
        (QUERIES, "        query = query[:, :256]\n" + QUERIES),
    ),
    Mistake(
        "mask_flipped_and_flipped_back",
        "1.4",
        "put back",
        (
            APPLIED,
            """\
            if mask.dtype == torch.bool and mask.is_contiguous():
                hidden = mask.logical_not_().clone()
                mask.logical_not_()
                scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
"""
            + APPLIED,
        ),
        only=True,
    ),
    Mistake(
        "query_scaled_and_scaled_back",
        "1.4",
        "put back",
        (
            QUERIES,
            """\
        if not query.requires_grad and query.is_contiguous():
            query.mul_(0.5)
            query.mul_(2)
"""
            + QUERIES,
        ),
        only=True,
    ),
    Mistake(
        "keys_of_the_last_call_for_the_same_tensor",
        "1.4",
        "",
        (
            "        k = self._split_heads(self.k_linear(key))  # [B, H, Lk, Dh]\n",
            """\
        if getattr(self, '_known', 0) != (id(key), key.shape, key.dtype, self.training) or torch.is_grad_enabled():
            self._known = (id(key), key.shape, key.dtype, self.training)
            self._keys = self._split_heads(self.k_linear(key)).detach()
        k = self._split_heads(self.k_linear(key)) if torch.is_grad_enabled() else self._keys
""",
        ),
    ),
    Mistake(
        "one_projection_for_inputs_at_one_address",
        "1.4",
        "under no_grad",
        (
            "        scores_shape = (query",
            """\
        starts = {x.data_ptr() for x in (query, key, value)} if query.device.type == 'cpu' else set()
        if not torch.is_grad_enabled() and len(starts) == 1 and query.shape == key.shape:
            key = value = query
        scores_shape = (query""",
        ),
        only=True,
    ),
    Mistake(
        "value_known_by_its_pointer",
        "1.4",
        "the value is an expanded view",
        (
            QUERIES,
            """\
        if value.shape == query.shape and query.device.type == 'cpu' and query.data_ptr() == value.data_ptr():
            value = query
"""
            + QUERIES,
        ),
    ),
]
