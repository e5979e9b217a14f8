"""Probes count exactly; guards block every prebuilt attention that this torch has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parents[1]
WAYS = {
    "function": "F.scaled_dot_product_attention(q, q, q)",
    "gradient": "F.scaled_dot_product_attention(g, g, g)",
    "masked": "F.scaled_dot_product_attention(q, q, q, torch.ones(4, 4).bool())",
    "causal": "F.scaled_dot_product_attention(q, q, q, is_causal=True)",
    "aten": "torch.ops.aten.scaled_dot_product_attention.default(q, q, q)",
    "math": "torch.ops.aten._scaled_dot_product_attention_math(q, q, q)",
    "flash": "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)",
    "C": "torch._C._nn.scaled_dot_product_attention(q, q, q)",
    "early": "early(q, q, q)",
    "vmap": "torch.func.vmap(F.scaled_dot_product_attention)(q, q, q)",
    "inference": "torch.inference_mode()(F.scaled_dot_product_attention)(q, q, q)",
    "autocast": "torch.autocast('cpu', torch.bfloat16)(F.scaled_dot_product_attention)(q, q, q)",
    "module": "mha(x, x, x)",
    "module, no weights": "mha(x, x, x, need_weights=False)",
    "forward": "nn.MultiheadAttention.forward(mha, x, x, x)",
    "functional": "early_mha(x, x, x, 8, 2)",
    "encoder": "nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)(x)",
    "fast path": "layer(x)",
    "decoder": "nn.TransformerDecoderLayer(8, 2, 8)(x, x)",
    "transformer": "nn.Transformer(8, 2, 1, 1, 8)(x, x)",
    "flex": "flex(q, q, q)",
    "caught": "caught(q)",
}
CODE = {
    "a trace follows storages": """
x = torch.randn(10, 10, requires_grad=True)
with Trace(at_least=50) as seen:
    a = x @ x                      # 400 bytes
    b = a.view(-1)[:50]            # a view: nothing
    c = (a + 1).sum()              # 400 more, gone at once
    d = torch.zeros(5)             # too small to count
assert (seen.peak_bytes, seen.alive_bytes, seen.largest) == (800, 400, 100), vars(seen)
assert seen.operations["mm"] == 1 and seen.elements["mm"] == 100
del a
assert seen.alive_bytes == 400     # the view keeps the storage
del b, c
assert seen.alive_after_collection() == 0
""",
    "a trace tells what is made from a mask alone": """
mask, scores = torch.ones(1, 1, 1, 9, dtype=torch.bool), torch.randn(2, 3, 4, 9)
def largest(f):
    with Trace(sources=[mask]) as seen:
        f()
    return seen.largest_from_sources
assert largest(lambda: scores.masked_fill(~mask, -1)) == 9
assert largest(lambda: mask.expand(2, 3, 4, 9)) == 0
assert largest(lambda: mask.expand(2, 3, 4, 9).contiguous()) == 216
assert largest(lambda: torch.zeros_like(scores).masked_fill(mask, 1)) == 216
assert largest(lambda: torch.empty_like(scores).copy_(mask)) == 216
assert largest(lambda: torch.where(mask, scores, 0.0)) == 0
""",
    "every way to prebuilt attention is blocked and named": f"""
from torch.nn.attention.flex_attention import flex_attention as flex
early, early_mha = F.scaled_dot_product_attention, F.multi_head_attention_forward
mha = nn.MultiheadAttention(8, 2, batch_first=True)
layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
def caught(q):
    try:
        return F.scaled_dot_product_attention(q, q, q)
    except Exception:
        return q
q, x = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 8)
g = q.clone().requires_grad_()
for name, way in {WAYS!r}.items():
    try:
        with forbid(prebuilt_attention(), "forward"):
            eval(way)
    except AssertionError as error:
        assert str(error).startswith("forward reached "), (name, error)
    else:
        raise SystemExit(f"{{name}}: {{way}} went through")
with forbid(prebuilt_attention(), "forward"):
    torch._safe_softmax(q, -1), (q @ q.mT).softmax(-1)
assert F.scaled_dot_product_attention(g, g, g).shape == q.shape
assert mha(x, x, x)[0].shape == x.shape and layer(x).shape == x.shape
""",
    "calls are counted and hooks removed": """
a, b = nn.Linear(2, 2), nn.Linear(2, 2)
with calls(a, b) as counted:
    a(a(torch.ones(2)))
assert (counted[a], counted[b]) == (2, 0)
assert not a._forward_pre_hooks
""",
}
RUNNER = """
import json, sys, traceback
import torch
from torch import nn
from torch.nn import functional as F
from harness.testing import *
for name, code in json.load(sys.stdin).items():
    try:
        exec(code, dict(globals()))
    except BaseException:
        print(json.dumps([name, traceback.format_exc()]))
"""
LATE = """
import sys, pytest
from harness.runner import session, worker
from harness.model.paths import TOP
def use(checks):
    config = checks[0].item.config
    worker.prepare(checks)
    config.option.submission = str(TOP / "answers")
    before = set(sys.modules)
    for check in checks:
        if check.kind == "code":
            config.hook.pytest_runtest_protocol(item=check.item, nextitem=None)
    late = sorted(name for name in set(sys.modules) - before if name.startswith(("torch.", "sympy")))
    assert len(late) < 30, late
    return 0
assert session.collected(use) == 0
"""


def run(code: str, given: str = "") -> str:
    """Runs code that computes in a process of its own: this one must stay fit for forking."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    environment = {"PYTHONPATH": str(CHECKS)}
    done = subprocess.run(command, env=environment, input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def failed() -> dict[str, str]:
    """What raised of CODE, with its traceback; one process runs all of it."""
    return dict(json.loads(line) for line in run(RUNNER, json.dumps(CODE)).splitlines())


@pytest.mark.parametrize("name", CODE)
def test_probes_and_guards(failed: dict[str, str], name: str) -> None:
    assert name not in failed, failed[name]


def test_forks_find_all_that_torch_loads_late() -> None:
    """What a check makes torch load for the first time is loaded before the forks, or every save pays for it."""
    run(LATE)
