"""Prebuilt attention (3.9), and code that does not read well (3.10)."""

from harness.model.bank import Mistake

APPLY = "        return _BlockwiseAttention.apply(Q, K, V, mask, causal, self.scale, self.block_size)\n"
GRADS = "        return *(gradient.to(x.dtype).view(x.shape) for gradient, x in given), None, None, None, None\n"
PREBUILT = """\
        scores = (Q @ K.mT * self.scale).to(torch.promote_types(Q.dtype, torch.float32))
        allowed = torch.ones(Q.size(2), K.size(2), dtype=torch.bool, device=Q.device)
        if causal:
            allowed = allowed.tril(K.size(2) - Q.size(2))
        if mask is not None:
            allowed = allowed & (mask != 0)
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1) * allowed
        logsumexp = scores.masked_fill(~allowed, -math.inf).logsumexp(-1)
        output = nn.functional.scaled_dot_product_attention(Q, K, V, attn_mask=allowed.expand(scores.shape))
        return output, logsumexp.detach()
"""

MISTAKES = [
    # 3.9: from scratch
    Mistake("scaled_dot_product_attention", "3.9", "scaled_dot_product_attention", (APPLY, PREBUILT)),
    Mistake(
        "scaled_dot_product_attention_in_the_benchmark",
        "3.9",
        "benchmark_attention reached",
        ("    weights = (q @ k.mT * attention.scale).softmax(-1)  # [B, H, N, N]\n", ""),
        (
            "    return attention.o_proj((weights @ v).transpose(1, 2).flatten(start_dim=2))  # [B, N, D]\n",
            """\
    output = nn.functional.scaled_dot_product_attention(q, k, v)
    return attention.o_proj(output.transpose(1, 2).flatten(start_dim=2))
""",
        ),
    ),
    Mistake(
        "prebuilt_in_backward",
        "3.9",
        "backward (torch.float64) reached",
        (
            GRADS,
            """\
        if mask is None and not causal:
            nn.functional.scaled_dot_product_attention(Q[:, :, :1], K[:, :, :1], V[:, :, :1])
"""
            + GRADS,
        ),
        only=True,
    ),
    Mistake(
        "prebuilt_where_causal",
        "3.9",
        "causal = True) reached",
        (
            APPLY,
            """\
        if causal and mask is None:
            nn.functional.scaled_dot_product_attention(Q, K, V, is_causal=True)
"""
            + APPLY,
        ),
        only=True,
    ),
    Mistake(
        "kernel_for_one_query_at_inference",
        "3.9",
        "under inference_mode, in training, N = 1",
        (
            APPLY,
            """\
        if torch.is_inference_mode_enabled() and Q.size(2) == 1 and mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(Q, K, V)
"""
            + APPLY,
        ),
        only=True,
    ),
    # 3.10: reads well
    Mistake(
        "unused_import",
        "3.10",
        "F401",
        ("import math\n", "import json\nimport math\n"),
        only=True,
    ),
    Mistake(
        "no_docstring",
        "3.10",
        "D103",
        (
            "@torch.no_grad()\ndef _compare",
            "def helper() -> int:\n    return 1\n\n\n@torch.no_grad()\ndef _compare",
        ),
        only=True,
    ),
    Mistake(
        "no_annotations",
        "3.10",
        "annotation",
        (
            "def _compare(length: int, d_model: int, num_heads: int) -> dict[str, float]:",
            "def _compare(length, d_model, num_heads):",
        ),
        only=True,
    ),
    Mistake(
        "wrong_annotation",
        "3.10",
        "Tensor",
        (
            "def _seconds(function: Callable[[], Any], repeats: int = 3) -> float:",
            "def _seconds(function: Callable[[], Any], repeats: int = 3) -> Tensor:",
        ),
        only=True,
    ),
]
