"""Wrong answers to ex01: other values or gradients than PyTorch's (1.6), and prebuilt attention (1.8)."""

from harness.model.bank import Mistake

QUERIES = "        q = self._split_heads(self.q_linear(query))  # [B, H, Lq, Dh]\n"
COMPUTED = "        scores = self.compute_attention_scores(q, k)  # [B, H, Lq, Lk]\n"
SOFTMAX = "        weights = scores.softmax(dim=-1)\n"
CONTEXT = "        context = weights @ v  # [B, H, Lq, Dh]\n"
RETURN = "        return self.output_linear(joined), weights\n"
SPLIT = "        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, Dh]\n"

MISTAKES = [
    # 1.6 agreement with PyTorch
    Mistake(
        "no_transpose",
        "1.6",
        "weights",
        (SPLIT, "        return x.reshape(x.size(0), self.num_heads, x.size(1), -1)\n"),
    ),
    Mistake(
        "no_transpose_back",
        "1.6",
        "output",
        (
            "        joined = context.transpose(1, 2).flatten(start_dim=2)  # [B, Lq, D]\n",
            "        joined = context.reshape(query.shape)\n",
        ),
    ),
    Mistake(
        "interleaved_heads",
        "1.6",
        "weights",
        (SPLIT, "        return x.unflatten(-1, (-1, self.num_heads)).permute(0, 3, 1, 2)\n"),
    ),
    Mistake("softmax_over_queries", "1.6", "weights", (SOFTMAX, "        weights = scores.softmax(dim=-2)\n")),
    Mistake("no_output_projection", "1.6", "output", (RETURN, "        return joined, weights\n")),
    Mistake(
        "no_output_bias", "1.6", "output", (RETURN, "        return joined @ self.output_linear.weight.T, weights\n")
    ),
    Mistake(
        "weights_averaged", "1.6", "shapes", (RETURN, "        return self.output_linear(joined), weights.mean(1)\n")
    ),
    Mistake(
        "detached_weights",
        "1.6",
        "must carry gradient",
        (RETURN, "        return self.output_linear(joined), weights.detach()\n"),
    ),
    Mistake(
        "detached_scores",
        "1.6",
        "gradient",
        (COMPUTED, "        scores = self.compute_attention_scores(q.detach(), k)\n"),
    ),
    Mistake(
        "near_miss_of_1e_7",
        "1.6",
        "output",
        (RETURN, "        return self.output_linear(joined) * (1 + 1e-7), weights\n"),
    ),
    Mistake(
        "no_gradient_in_eval",
        "1.6",
        "detached",
        (
            QUERIES,
            """\
        if not self.training:
            query, key, value = query.detach(), key.detach(), value.detach()
        q = self._split_heads(self.q_linear(query))
""",
        ),
        only=True,
    ),
    Mistake(
        "weights_cached_at_the_first_call",
        "1.6",
        "changed in place",
        (
            QUERIES,
            """\
        if not hasattr(self, '_wq'):
            self._wq = self.q_linear.weight.detach().clone()
        stale = self._wq.to(query) - self.q_linear.weight.detach()
        q = self._split_heads(self.q_linear(query) + query @ stale.T)
""",
        ),
    ),
    # 1.8 from scratch
    Mistake(
        "prebuilt",
        "1.8",
        "scaled_dot_product_attention",
        (
            CONTEXT,
            """\
        if mask is not None:
            context = nn.functional.scaled_dot_product_attention(q, k, v, mask.bool())
        else:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
""",
        ),
    ),
    Mistake(
        "prebuilt_and_caught",
        "1.8",
        "reached scaled_dot_product_attention",
        (
            CONTEXT,
            """\
        context = weights @ v
        try:
            context = context + 0 * nn.functional.scaled_dot_product_attention(q, k, v).detach()
        except RuntimeError:
            pass
""",
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_module",
        "1.8",
        "MultiheadAttention.forward",
        (
            SOFTMAX,
            """\
        helper = nn.MultiheadAttention(query.size(-1), self.num_heads, batch_first=True).to(query)
        with torch.no_grad():
            helper(query, key, value)
"""
            + SOFTMAX,
        ),
    ),
    # Narrow code: right in the sizes, modes and masks that come first to mind.
    Mistake("heads_are_3", "1.6", "size", ("        self.num_heads = num_heads\n", "        self.num_heads = 3\n")),
    Mistake("head_dim_is_4", "1.6", "", (SPLIT, "        return x.unflatten(-1, (-1, 4)).transpose(1, 2)\n")),
    Mistake(
        "weights_detached_in_eval",
        "1.6",
        "must carry gradient",
        (RETURN, "        return self.output_linear(joined), weights if self.training else weights.detach()\n"),
        only=True,
    ),
    Mistake(
        "keys_detached_in_eval",
        "1.6",
        "gradient",
        (
            COMPUTED,
            """\
        if not self.training:
            k = k.detach() + 0 * k
        scores = self.compute_attention_scores(q, k)
""",
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_for_long_inputs",
        "1.8",
        "scaled_dot_product_attention",
        (
            CONTEXT,
            CONTEXT
            + """\
        if mask is None and self.dropout.p == 0 and key.size(1) >= 16:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
""",
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_in_float32",
        "1.8",
        "scaled_dot_product_attention",
        (
            CONTEXT,
            CONTEXT
            + """\
        if mask is None and not self.training and q.dtype == torch.float32:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
""",
        ),
        only=True,
    ),
    # What one situation hides: state from an earlier call or from another module, modes, precision.
    Mistake(
        "softmax_in_float32",
        "1.6",
        "values differ",
        (SOFTMAX, "        weights = scores.float().softmax(dim=-1).to(scores.dtype)\n"),
    ),
    Mistake(
        "stacked_weights_of_the_first_inference",
        "1.6",
        "",
        (
            QUERIES,
            """\
        if not torch.is_grad_enabled() and not hasattr(self, '_stacked'):
            self._stacked = self.q_linear.weight.detach().clone()
        if not torch.is_grad_enabled():
            q = self._split_heads(nn.functional.linear(query, self._stacked.to(query), self.q_linear.bias))
        else:
            q = self._split_heads(self.q_linear(query))
""",
        ),
    ),
    Mistake(
        "constant_of_a_call_at_inference",
        "1.6",
        "inference tensors",
        (
            SOFTMAX,
            """\
        if not hasattr(self, '_one'):
            self._one = torch.ones((), dtype=torch.float64)
        weights = (scores * self._one).softmax(dim=-1)
""",
        ),
        only=True,
    ),
    Mistake(
        "head_dim_by_d_model_for_all_modules",
        "1.6",
        "d_model=20, heads=2",
        (
            COMPUTED,
            """\
        if not hasattr(MultiHeadAttention, 'sizes'):
            MultiHeadAttention.sizes = {}
        head_dim = MultiHeadAttention.sizes.setdefault(query.size(-1), q.size(-1))
        scores = self.compute_attention_scores(q, k) * (q.size(-1) / head_dim) ** 0.5
""",
        ),
        only=True,
    ),
    Mistake(
        "scale_by_num_heads_for_all_modules",
        "1.6",
        "d_model=15, heads=5",
        (
            COMPUTED,
            """\
        if not hasattr(MultiHeadAttention, 'sizes'):
            MultiHeadAttention.sizes = {}
        head_dim = MultiHeadAttention.sizes.setdefault(self.num_heads, q.size(-1))
        scores = self.compute_attention_scores(q, k) * (q.size(-1) / head_dim) ** 0.5
""",
        ),
        only=True,
    ),
    Mistake(
        "dropout_noise_in_float32",
        "1.6",
        "rounded to float32",
        (
            "        weights = self.dropout(weights)\n",
            """\
        if self.training and self.dropout.p > 0:
            kept = 1 - self.dropout.p
            noise = torch.empty(weights.shape, device=weights.device).bernoulli_(kept)
            weights = weights * noise.div_(max(kept, 1e-9)).to(weights.dtype)
""",
        ),
        only=True,
    ),
    Mistake(
        "dropout_gradient_in_float32",
        "1.6",
        "backward: gradient of query",
        (
            "        weights = self.dropout(weights)\n",
            """\
        weights = self.dropout(weights)
        if self.training and self.dropout.p > 0 and weights.requires_grad:
            weights.register_hook(lambda grad: grad.float().to(grad.dtype))
""",
        ),
        only=True,
    ),
    Mistake(
        "heads_of_the_last_module_made",
        "1.6",
        "head",
        ("        self.num_heads = num_heads\n", "        MultiHeadAttention.num_heads = num_heads\n"),
    ),
    Mistake(
        "prebuilt_in_half_precision",
        "1.8",
        "scaled_dot_product_attention",
        (
            CONTEXT,
            CONTEXT
            + """\
        if mask is None and not self.training and q.dtype.itemsize == 2:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
""",
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_at_inference",
        "1.8",
        "scaled_dot_product_attention",
        (
            CONTEXT,
            CONTEXT
            + """\
        if mask is None and torch.is_inference_mode_enabled():
            context = nn.functional.scaled_dot_product_attention(q, k, v)
""",
        ),
    ),
    Mistake(
        "prebuilt_for_one_query",
        "1.8",
        "scaled_dot_product_attention",
        (
            CONTEXT,
            CONTEXT
            + """\
        if mask is not None and not torch.is_grad_enabled() and query.size(1) == 1:
            rows = mask.bool().any(-1, keepdim=True)
            context = nn.functional.scaled_dot_product_attention(q, k, v, mask.bool()).where(rows, 0)
""",
        ),
        only=True,
    ),
    Mistake(
        "weights_known_by_version_at_inference",
        "1.6",
        "edited",
        (
            "        v = self._split_heads(self.v_linear(value))",
            """\
        weight = self.v_linear.weight
        name = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self.training or torch.is_grad_enabled():
            values = self.v_linear(value)
        else:
            if getattr(self, '_packed', (None, None))[0] != name:
                self._packed = (name, weight.detach().clone())
            values = nn.functional.linear(value, self._packed[1], self.v_linear.bias)
        v = self._split_heads(values)""",
        ),
    ),
    Mistake(
        "gradient_of_a_value_on_the_keys_memory",
        "1.6",
        "same memory: gradient of key",
        (
            QUERIES,
            """\
        if key.device.type == 'cpu' and key.data_ptr() == value.data_ptr() and key.stride() == value.stride():
            value = key
"""
            + QUERIES,
        ),
    ),
    Mistake(
        "gradient_of_a_key_on_the_querys_memory",
        "1.6",
        "same memory: gradient of query",
        (
            QUERIES,
            """\
        if query.device.type == 'cpu' and query.data_ptr() == key.data_ptr() and query.stride() == key.stride():
            key = query if query.shape == key.shape else key
"""
            + QUERIES,
        ),
    ),
    Mistake(
        "prebuilt_for_many_keys",
        "1.8",
        "scaled_dot_product_attention",
        (
            CONTEXT,
            """\
        context = weights @ v
        if mask is None and k.size(2) > 256 and not torch.is_grad_enabled() and not self.training:
            context, weights = torch.ops.aten._scaled_dot_product_attention_math(q, k, v)
""",
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_for_many_queries",
        "1.8",
        "scaled_dot_product_attention",
        (
            CONTEXT,
            CONTEXT
            + """\
        if mask is None and not self.training and q.size(2) > 256:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
""",
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_for_long_sequences",
        "1.8",
        "scaled_dot_product_attention",
        (
            CONTEXT,
            CONTEXT
            + """\
        if mask is None and self.dropout.p == 0 and min(q.size(2), k.size(2)) > 256:
            context = nn.functional.scaled_dot_product_attention(q, k, v)
""",
        ),
        only=True,
    ),
]
