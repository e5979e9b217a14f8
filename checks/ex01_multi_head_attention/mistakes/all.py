"""Wrong answers to ex01 that its checks must catch."""

from harness.model.bank import Mistake as _New


def Mistake(name, caught_by, edits, says, only=False):  # type: ignore
    return _New(name, caught_by, says, *edits, only=only)


SCORES = """        scale = q.size(-1) ** -0.25
        return (q * scale) @ (k * scale).mT
"""
MASKED = "        return scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)\n"
SOFTMAX = "        weights = scores.softmax(dim=-1)\n"
ZEROED = "            weights = weights * mask.bool()\n"
CONTEXT = "        context = weights @ v  # [B, H, Lq, Dh]\n"
DROPPED = "        weights = self.dropout(weights)\n"
RETURN = "        return self.output_linear(joined), weights\n"
SPLIT = "        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, Dh]\n"
CHECK = "            self._check_mask(mask, scores_shape)\n"
CHECKED = "        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, scores_shape, strict=True))\n"
PREBUILT = """        if mask is not None:
            context = nn.functional.scaled_dot_product_attention(q, k, v, mask.bool())
        else:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
"""
Q = "        q = self._split_heads(self.q_linear(query))  # [B, H, Lq, Dh]\n"
APPLY = "            scores = self.apply_mask(scores, mask)\n"
OWN_TEST = "    torch.manual_seed(0)\n    attention = MultiHeadAttention(12, 3, dropout=0.5).eval()\n"

MISTAKES = [
    # Nothing at all.
    Mistake("zeros", ("1.1", "1.3", "1.4", "1.6", "1.7", "1.8"), [(RETURN, "        return torch.zeros_like(query), weights\n")], says="output"),
    Mistake("identity", ("1.1", "1.4", "1.6"), [(RETURN, "        return query, weights\n")], says="output"),
    Mistake("none", "1.1", [(RETURN, "        return None\n")], says="NoneType"),
    Mistake("output_alone", "1.1", [(RETURN, "        return self.output_linear(joined)\n")], says="pair (output, weights)"),
    Mistake("a_list", "1.1", [(RETURN, "        return [self.output_linear(joined), weights]\n")], says="list came"),
    # 1.1
    Mistake("view_of_the_queries_length", "1.1", [(SPLIT, "        length = self._lq = getattr(self, '_lq', x.size(1))\n        return x.reshape(x.size(0), length, self.num_heads, -1).transpose(1, 2)\n")], says="size"),
    Mistake("every_row_attends_to_row_0", "1.1", [("        v = self._split_heads(self.v_linear(value))", "        v = self._split_heads(self.v_linear(value[:1].expand_as(value)))")], says="output"),
    Mistake("squeezed_single_query", "1.1", [(RETURN, "        return self.output_linear(joined).squeeze(1), weights\n")], says="shape", only=True),
    # 1.2
    Mistake("inverted_mask", "1.2", [(MASKED, MASKED.replace("mask == 0", "mask != 0"))], says="true in the mask"),
    Mistake("mask_ignored", "1.2", [(MASKED, "        return scores\n"), (ZEROED, "            pass\n")], says="weight exactly 0"),
    Mistake("integer_mask_inverted_bitwise", "1.2", [(MASKED, "        return scores.masked_fill((~mask).bool(), torch.finfo(scores.dtype).min)\n")], says="true in the mask"),
    Mistake("only_bool_masks", "1.2", [(MASKED, "        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)\n")], says="boolean mask"),
    Mistake("nan_for_masked_rows", "1.2", [(MASKED, MASKED.replace("torch.finfo(scores.dtype).min", 'float("-inf")')), (ZEROED, "            pass\n")], says="NaN"),
    Mistake("nan_in_the_gradient", "1.2", [(MASKED, '        return scores + torch.where(mask.bool(), 0.0, float("-inf")).to(scores)\n'), (ZEROED, "            weights = torch.where(mask.bool().any(-1, keepdim=True), weights, torch.zeros((), dtype=weights.dtype, device=weights.device))\n")], says="gradient is not finite"),
    Mistake("uniform_masked_rows", "1.2", [(ZEROED, "            pass\n")], says="weights"),
    Mistake("small_fill", "1.2", [(MASKED, MASKED.replace("torch.finfo(scores.dtype).min", "-20.0"))], says="forbidden weights"),
    Mistake("fill_of_1e4", "1.2", [(MASKED, MASKED.replace("torch.finfo(scores.dtype).min", "-1e4"))], says="forbidden weights", only=True),
    Mistake("mask_times_scores", "1.2", [(MASKED, "        return scores * mask\n")], says="weight exactly 0"),
    Mistake("mask_after_softmax", "1.2", [("            scores = self.apply_mask(scores, mask)\n", "            pass\n")], says="mask"),
    Mistake("mask_of_the_first_row_for_all", "1.2", [("            scores = self.apply_mask(scores, mask)\n", "            mask = mask[:1]\n            scores = self.apply_mask(scores, mask)\n")], says="mask"),
    Mistake("mask_of_the_first_head_for_all", "1.2", [("            scores = self.apply_mask(scores, mask)\n", "            mask = mask[:, :1]\n            scores = self.apply_mask(scores, mask)\n")], says="mask of shape", only=True),
    Mistake("bad_masks_accepted", "1.2", [(CHECK, "            pass\n")], says="mask of shape", only=True),
    Mistake("only_dimensions_checked", "1.2", [(CHECKED, "        fits = mask.dim() == 4\n")], says="mask of shape", only=True),
    Mistake("broadcastable_is_enough", "1.2", [(CHECKED, "        try:\n            torch.broadcast_shapes(mask.shape, scores_shape)\n            fits = mask.dim() == 4\n        except RuntimeError:\n            fits = False\n")], says="was accepted", only=True),
    Mistake("mask_error_without_shapes", "1.2", [('raise ValueError(f"mask of shape {tuple(mask.shape)} does not broadcast to the scores\' {scores_shape}")', 'raise ValueError("bad mask")')], says="lacks", only=True),
    Mistake("bad_d_model_accepted", "1.2", [("        if d_model % num_heads != 0:\n", "        if d_model < num_heads:\n")], says="MultiHeadAttention(10, 4)", only=True),
    Mistake("d_model_asserted", "1.2", [('            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")\n', '            raise AssertionError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")\n')], says="ValueError was wanted", only=True),
    # 1.3
    Mistake("broadcast_product", "1.3", [(SCORES, "        return (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / q.size(-1) ** 0.5\n")], says="multiply matrices", only=True),
    Mistake("broadcast_context", "1.3", [(CONTEXT, "        context = (weights.unsqueeze(-1) * v.unsqueeze(2)).sum(3)\n")], says="multiply matrices", only=True),
    Mistake("mask_repeated", "1.3", [("            scores = self.apply_mask(scores, mask)\n", "            mask = mask.expand(scores.shape).contiguous()\n            scores = self.apply_mask(scores, mask)\n")], says="is copied to", only=True),
    Mistake("mask_as_full_bias", "1.3", [(MASKED, "        lowest = torch.finfo(scores.dtype).min\n        return scores + torch.zeros_like(scores).masked_fill(mask == 0, lowest)\n")], says="is copied to"),
    Mistake("six_scores_alive", "1.3", [(SOFTMAX, "        steps = [scores * 1, scores * 1, scores * 1, scores * 1]\n        weights = sum(steps[1:], steps[0] * 0 + steps[1] * 0).mul(1 / 3).softmax(dim=-1)\n")], says="alive at once"),
    Mistake("five_scores_kept", "1.3", [(SOFTMAX, "        weights = (scores.exp().exp().log().log()).softmax(dim=-1).sqrt().square()\n")], says="kept for backward"),
    Mistake("weights_kept_in_the_module", "1.3", [(RETURN, "        self.last_weights = weights.detach()\n" + RETURN)], says="stay alive", only=True),
    Mistake("query_kept_in_the_module", "1.3", [(RETURN, "        self.last_query = query\n" + RETURN)], says="query stays alive", only=True),
    # 1.4
    Mistake("values_from_key", "1.4", [("self.v_linear(value)", "self.v_linear(key)")], says="each has its own projection"),
    Mistake("keys_from_query_where_lengths_agree", "1.4", [("self.k_linear(key)", "self.k_linear(query if query.shape == key.shape else key)")], says="several roles"),
    Mistake("view_of_strided_inputs", "1.4", [("self.q_linear(query)", "self.q_linear(query.view(-1, query.size(-1))).view(query.shape)")], says="view", only=True),
    Mistake("inputs_scaled_in_place", "1.4", [("        q = self._split_heads(self.q_linear(query))", "        if not query.requires_grad:\n            query.mul_(1.0 + 1e-3)\n        q = self._split_heads(self.q_linear(query / (1.0 + 1e-3)))")], says="values differ"),
    Mistake("mask_written_to", "1.4", [("            scores = self.apply_mask(scores, mask)\n", "            scores = self.apply_mask(scores, mask)\n            mask[0, 0, 0, 0] = True\n")], says="mask"),
    # 1.5
    Mistake("no_scale", "1.5", [(SCORES, "        return q @ k.mT\n")], says="√"),
    Mistake("scale_by_d_model", "1.5", [("        scale = q.size(-1) ** -0.25\n", "        scale = (q.size(-1) * self.num_heads) ** -0.25\n")], says="1/√head_dim"),
    Mistake("scale_by_head_dim", "1.5", [("        scale = q.size(-1) ** -0.25\n", "        scale = q.size(-1) ** -0.5\n")], says="√"),
    Mistake("scaled_in_forward_instead", "1.5", [(SCORES, "        return q @ k.mT\n"), ("        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]\n", "        scores = self.compute_attention_scores(q, k) / q.size(-1) ** 0.5\n")], says="√", only=True),
    Mistake("scaled_twice", "1.5", [("        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]\n", "        scores = self.compute_attention_scores(q, k) / q.size(-1) ** 0.5\n")], says="scaled once"),
    Mistake("dropout_in_eval", "1.5", [(DROPPED, "        weights = nn.functional.dropout(weights, self.dropout.p)\n")], says="eval"),
    Mistake("no_dropout", "1.5", [(DROPPED, "")], says="dropout", only=True),
    Mistake("dropout_on_scores", "1.5", [(DROPPED, ""), (SOFTMAX, "        weights = self.dropout(scores).softmax(dim=-1)\n")], says="dropout", only=True),
    Mistake("dropout_on_the_context", "1.5", [(DROPPED, ""), (CONTEXT, "        context = self.dropout(weights @ v)\n")], says="dropout", only=True),
    Mistake("dropout_on_the_output_too", "1.5", [(RETURN, "        return self.dropout(self.output_linear(joined)), weights\n")], says="nothing else is dropped", only=True),
    Mistake("weights_before_dropout_returned", "1.5", [(DROPPED, "        dropped = self.dropout(weights)\n"), (CONTEXT, "        context = dropped @ v\n")], says="weights", only=True),
    Mistake("mean_not_preserved", "1.5", [(DROPPED, "        if self.training and self.dropout.p > 0:\n            weights = weights * (torch.rand_like(weights) >= self.dropout.p)\n")], says="mean", only=True),
    Mistake("renormalised_after_dropout", "1.5", [(DROPPED, "        weights = self.dropout(weights)\n        if self.training and self.dropout.p > 0:\n            weights = weights / weights.sum(-1, keepdim=True)\n")], says="mean", only=True),
    Mistake("dropout_of_whole_heads", "1.5", [(DROPPED, "        weights = weights * self.dropout(torch.ones_like(weights[..., :1, :1]))\n")], says="", only=True),
    Mistake("one_pattern_for_all_heads", "1.5", [(DROPPED, "        weights = weights * self.dropout(torch.ones_like(weights[:, :1]))\n")], says="all heads", only=True),
    Mistake("private_random_stream", "1.5", [(DROPPED, "        if self.training and self.dropout.p > 0:\n            import random\n\n            generator = torch.Generator().manual_seed(random.randrange(10**9))\n            kept = torch.rand(weights.shape, generator=generator).to(weights) >= self.dropout.p\n            weights = weights * kept / (1 - self.dropout.p)\n")], says="torch.manual_seed", only=True),
    Mistake("dropout_half_whatever_asked", "1.5", [(DROPPED, "        weights = nn.functional.dropout(weights, 0.5, self.training and self.dropout.p > 0)\n")], says="0.2", only=True),
    # 1.6
    Mistake("no_transpose", "1.6", [(SPLIT, "        return x.reshape(x.size(0), self.num_heads, x.size(1), -1)\n")], says="weights"),
    Mistake("no_transpose_back", "1.6", [("        joined = context.transpose(1, 2).flatten(start_dim=2)  # [B, Lq, D]\n", "        joined = context.reshape(query.shape)\n")], says="output"),
    Mistake("interleaved_heads", "1.6", [(SPLIT, "        return x.unflatten(-1, (-1, self.num_heads)).permute(0, 3, 1, 2)\n")], says="weights"),
    Mistake("softmax_over_queries", "1.6", [(SOFTMAX, "        weights = scores.softmax(dim=-2)\n")], says="weights"),
    Mistake("no_output_projection", "1.6", [(RETURN, "        return joined, weights\n")], says="output"),
    Mistake("no_output_bias", "1.6", [(RETURN, "        return joined @ self.output_linear.weight.T, weights\n")], says="output"),
    Mistake("weights_averaged", "1.6", [(RETURN, "        return self.output_linear(joined), weights.mean(1)\n")], says="shapes"),
    Mistake("detached_weights", "1.6", [(RETURN, "        return self.output_linear(joined), weights.detach()\n")], says="must carry gradient"),
    Mistake("detached_scores", "1.6", [("        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]\n", "        scores = self.compute_attention_scores(q.detach(), k)\n")], says="gradient"),
    Mistake("near_miss_of_1e_7", "1.6", [(RETURN, "        return self.output_linear(joined) * (1 + 1e-7), weights\n")], says="output"),
    Mistake("no_gradient_in_eval", "1.6", [("        q = self._split_heads(self.q_linear(query))  # [B, H, Lq, Dh]\n", "        if not self.training:\n            query, key, value = query.detach(), key.detach(), value.detach()\n        q = self._split_heads(self.q_linear(query))\n")], says="detached", only=True),
    Mistake("weights_cached_at_the_first_call", "1.6", [("        q = self._split_heads(self.q_linear(query))  # [B, H, Lq, Dh]\n", "        if not hasattr(self, '_wq'):\n            self._wq = self.q_linear.weight.detach().clone()\n        stale = self._wq.to(query) - self.q_linear.weight.detach()\n        q = self._split_heads(self.q_linear(query) + query @ stale.T)\n")], says="changed in place"),
    # 1.7
    Mistake("fill_of_1e9", "1.7", [(MASKED, MASKED.replace("torch.finfo(scores.dtype).min", "-1e9"))], says="overflow"),
    Mistake("float32_results", "1.7", [(SOFTMAX, "        weights = scores.float().softmax(dim=-1) if scores.dtype.itemsize == 2 else scores.softmax(dim=-1)\n"), (CONTEXT, "        context = (weights @ v.to(weights.dtype)).to(v.dtype)\n")], says="dtype", only=True),
    Mistake("softmax_by_bare_exp", "1.7", [(SOFTMAX, "        powers = scores.exp()\n        weights = powers / powers.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)\n")], says="not finite"),
    Mistake("dtype_kept_from_the_first_call", "1.7", [("        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]\n", "        self._dtype = getattr(self, '_dtype', q.dtype)\n        scores = self.compute_attention_scores(q.to(self._dtype), k.to(self._dtype)).to(q.dtype)\n")], says="cast", only=True),
    Mistake("a_constant_on_the_cpu", "1.7", [("        self.num_heads = num_heads\n", "        self.num_heads = num_heads\n        self._scale = torch.ones(1)\n"), (SOFTMAX, "        weights = (scores * self._scale.to(scores.dtype)).softmax(dim=-1)\n")], says="", only=True),
    # 1.8
    Mistake("prebuilt", "1.8", [(CONTEXT, PREBUILT)], says="scaled_dot_product_attention"),
    Mistake("prebuilt_and_caught", "1.8", [(CONTEXT, "        context = weights @ v\n        try:\n            context = context + 0 * nn.functional.scaled_dot_product_attention(q, k, v).detach()\n        except RuntimeError:\n            pass\n")], says="reached scaled_dot_product_attention", only=True),
    Mistake("prebuilt_module", "1.8", [(SOFTMAX, "        helper = nn.MultiheadAttention(query.size(-1), self.num_heads, batch_first=True).to(query)\n        with torch.no_grad():\n            helper(query, key, value)\n" + SOFTMAX)], says="MultiheadAttention.forward"),
    # 1.9
    Mistake("own_test_that_always_fails", "1.9", [(OWN_TEST, OWN_TEST + "    assert False, 'not yet'\n")], says="not yet", only=True),
    Mistake("own_test_of_nothing", "1.9", [(OWN_TEST, OWN_TEST + "    if attention is not None:\n        return\n")], says="passes although", only=True),
    Mistake("own_test_without_masks", "1.9", [("    nothing_allowed = torch.zeros(2, 1, 5, 7)\n", "    if query is not None:\n        return\n    nothing_allowed = torch.zeros(2, 1, 5, 7)\n")], says="nan_for_masked_rows", only=True),
    Mistake("own_test_that_hangs", "1.9", [(OWN_TEST, OWN_TEST + "    while attention is not None:\n        pass\n")], says="did not end within", only=True),
    Mistake("own_test_that_exits", "1.9", [(OWN_TEST, OWN_TEST + "    import os\n\n    os._exit(0)\n")], says="ended its process", only=True),
    # 1.10
    Mistake("unused_import", "1.10", [("import torch\n", "import math\nimport torch\n")], says="F401", only=True),
    Mistake("untyped_helper", "1.10", [("    def _split_heads(self, x: Tensor) -> Tensor:\n", "    def _split_heads(self, x):\n")], says="annotation", only=True),
    Mistake("silenced", "1.10", [("from torch import Tensor, nn\n", "import math  # noqa: F401\nfrom torch import Tensor, nn\n")], says="F401", only=True),
    Mistake("all_silenced", "1.10", [("from torch import Tensor, nn\n", "from torch import Tensor, nn\n\n# ruff: noqa\n")], says="silences more than it names", only=True),
    # Narrow code: right in the sizes, modes and masks that come first to mind.
    Mistake("heads_are_3", "1.6", [("        self.num_heads = num_heads\n", "        self.num_heads = 3\n")], says="size"),
    Mistake("head_dim_is_4", "1.6", [(SPLIT, "        return x.unflatten(-1, (-1, 4)).transpose(1, 2)\n")], says=""),
    Mistake("value_is_query_where_key_is", "1.4", [(Q, "        if query is key:\n            value = query\n" + Q)], says="several roles", only=True),
    Mistake("key_is_query_where_value_is", "1.4", [(Q, "        if query is value:\n            key = query\n" + Q)], says="several roles"),
    Mistake("v_is_k_for_a_memory", "1.4", [("        v = self._split_heads(self.v_linear(value))", "        v = k if key is value and key is not query else self._split_heads(self.v_linear(value))")], says="several roles", only=True),
    Mistake("key_known_by_its_pointer", "1.4", [(Q, "        if query.shape == key.shape and query.device.type == 'cpu' and query.data_ptr() == key.data_ptr():\n            key = query\n" + Q)], says="transposed view", only=True),
    Mistake("mask_made_a_bias_in_place", "1.2", [(MASKED, "        bias = mask.to(scores.dtype)\n        bias -= 1\n        return scores.masked_fill(bias != 0, torch.finfo(scores.dtype).min)\n"), (ZEROED, "            weights = weights * allowed\n"), (APPLY, "            allowed = mask.bool()\n" + APPLY)], says="values differ"),
    Mistake("softmax_in_chunks_of_64_keys", "1.1", [(SOFTMAX, "        weights = torch.cat([part.softmax(dim=-1) for part in scores.split(64, dim=-1)], dim=-1)\n")], says="131 keys", only=True),
    Mistake("cut_at_64", "1.1", [("        scores_shape = (query", "        query, key, value = query[:, :64], key[:, :64], value[:, :64]\n        scores_shape = (query")], says="shape", only=True),
    Mistake("values_of_two_rows_for_all", "1.1", [(Q, "        value = value[torch.arange(value.size(0), device=value.device) % 2]\n" + Q)], says="batch rows", only=True),
    Mistake("mask_dtype_promotes", "1.2", [(ZEROED, "            weights = weights * mask\n")], says="scalar type"),
    Mistake("rows_masked_in_one_head_only", "1.2", [(ZEROED, "            weights = weights * mask.bool().any(dim=-1, keepdim=True).any(dim=1, keepdim=True)\n")], says="head 1", only=True),
    Mistake("apply_mask_for_bool_alone", "1.2", [(MASKED, MASKED.replace("mask == 0", "~mask")), (APPLY, "            mask = mask.bool()\n" + APPLY)], says="", only=True),
    Mistake("fill_of_65504", "1.2", [(MASKED, MASKED.replace("torch.finfo(scores.dtype).min", "-65504.0"))], says="forbidden weights", only=True),
    Mistake("keys_may_be_enlarged", "1.2", [("        if not fits:\n", "        fits = fits or (mask.dim() == 4 and scores_shape[3] == 1 and mask.shape[:3] == (1, 1, 1))\n        if not fits:\n")], says="ValueError was wanted", only=True),
    Mistake("heads_may_be_enlarged", "1.2", [("        if not fits:\n", "        fits = fits or (mask.dim() == 4 and scores_shape[1] == 1 and mask.shape[2:] == (1, 1) and mask.size(0) == 1)\n        if not fits:\n")], says="ValueError was wanted", only=True),
    Mistake("last_weights_in_a_buffer", "1.3", [(RETURN, "        if getattr(self, '_last', None) is None or self._last.shape != weights.shape:\n            self._last = torch.empty_like(weights, requires_grad=False)\n        self._last.copy_(weights.detach())\n" + RETURN)], says="stay alive", only=True),
    Mistake("weights_kept_with_dropout", "1.3", [(RETURN, "        self._last = weights if self.dropout.p > 0 else None\n" + RETURN)], says="stay alive", only=True),
    Mistake("broadcast_product_in_eval", "1.3", [(SCORES, "        if not self.training:\n            return (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / q.size(-1) ** 0.5\n" + SCORES)], says="multiply matrices", only=True),
    Mistake("mask_repeated_per_head", "1.3", [(APPLY, "            if mask.size(1) > 1:\n                mask = mask.expand(scores.shape).contiguous()\n" + APPLY)], says="is copied to", only=True),
    Mistake("mask_repeated_in_eval", "1.3", [(APPLY, "            if not self.training:\n                mask = mask.expand(scores.shape).contiguous()\n" + APPLY)], says="is copied to", only=True),
    Mistake("float_mask_repeated", "1.3", [(APPLY, "            if mask.dtype != torch.bool:\n                mask = mask.expand(scores.shape).contiguous()\n" + APPLY)], says="is copied to", only=True),
    Mistake("no_dropout_under_a_mask", "1.5", [(DROPPED, "        if mask is None:\n            weights = self.dropout(weights)\n")], says="dropout"),
    Mistake("no_dropout_under_no_grad", "1.5", [(DROPPED, "        weights = nn.functional.dropout(weights, self.dropout.p, self.training and weights.requires_grad)\n")], says="no_grad", only=True),
    Mistake("weights_detached_in_eval", "1.6", [(RETURN, "        return self.output_linear(joined), weights if self.training else weights.detach()\n")], says="must carry gradient", only=True),
    Mistake("keys_detached_in_eval", "1.6", [("        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]\n", "        if not self.training:\n            k = k.detach() + 0 * k\n        scores = self.compute_attention_scores(q, k)\n")], says="gradient", only=True),
    Mistake("randomness_of_the_cpu", "1.7", [(DROPPED, "        if self.training and self.dropout.p > 0:\n            kept = torch.rand(weights.shape) >= self.dropout.p\n            weights = weights * kept.to(weights.dtype) / (1 - self.dropout.p)\n")], says="", only=True),
    Mistake("prebuilt_for_long_inputs", "1.8", [(CONTEXT, CONTEXT + "        if mask is None and self.dropout.p == 0 and key.size(1) >= 16:\n            context = nn.functional.scaled_dot_product_attention(q, k, v)\n")], says="scaled_dot_product_attention", only=True),
    Mistake("prebuilt_in_float32", "1.8", [(CONTEXT, CONTEXT + "        if mask is None and not self.training and q.dtype == torch.float32:\n            context = nn.functional.scaled_dot_product_attention(q, k, v)\n")], says="scaled_dot_product_attention", only=True),
    Mistake("silenced_for_mypy", "1.10", [("    def _split_heads(self, x: Tensor) -> Tensor:\n", "    def _split_heads(self, x):  # mypy: allow-untyped-defs\n")], says="silences", only=True),
]  # fmt: skip
