"""Ways to gain points for ex01 without doing the work, as texts of a submission. Each earns nothing."""

from harness.model import bank
from harness.model.exercise import exercises

ANSWER = bank.answer(exercises()["ex01"])
HEAD, REST = ANSWER.split("class MultiHeadAttention", 1)
CLASS, TEST = ("class MultiHeadAttention" + REST).split("\ndef test_multihead_attention", 1)
TEST = "\ndef test_multihead_attention" + TEST
BODY = CLASS.index("        scores_shape = (")
NEXT = CLASS.index("    def compute_attention_scores")


def forward(body: str) -> str:
    """The answer with another body of forward, and without its test."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return HEAD + CLASS[:BODY] + lines + "\n" + CLASS[NEXT:]


ZEROS = forward(
    "b, lq, d = query.shape\n"
    "weights = query.new_zeros(b, 3, lq, key.size(1))\n"
    "return 0 * self.output_linear(query + key.sum() + value.sum()), weights"
)
SCORES = CLASS.index("        return", CLASS.index("def compute_attention_scores"))


def with_code(code: str) -> str:
    """An implementation that gives zeros, followed by code that runs on import."""
    return f"{ZEROS}\n\n{code}\n"


YES = "lambda *a, **k: torch.tensor(True)"
NOTHING = "lambda *a, **k: None"

ON_IMPORT = {
    # What compares.
    "assert_close": f"import torch.testing\ntorch.testing.assert_close = {NOTHING}",
    "the body of assert_close": "import torch.testing\n"
    "torch.testing.assert_close.__code__ = (lambda *a, **k: None).__code__",
    "isclose": "torch.isclose = lambda a, b, **k: torch.ones_like(a, dtype=torch.bool)",
    "all": f"torch.all = {YES}\ntorch.Tensor.all = {YES}",
    "equal and allclose": "torch.equal = torch.allclose = lambda *a, **k: True",
    "item": "torch.Tensor.item = lambda self: True",
    "bool": "torch.Tensor.__bool__ = lambda self: True",
    "eq and ne": f"torch.Tensor.__eq__ = {YES}\ntorch.Tensor.__hash__ = lambda self: id(self)",
    "shape and dtype": "torch.Tensor.shape = property(lambda self: (1,))",
    "detach": "torch.Tensor.detach = lambda self: torch.zeros(self.size(), dtype=self.dtype)",
    "the kernel of isclose": "library = torch.library.Library('aten', 'IMPL')\n"
    "library.impl('isclose', lambda a, b, *r, **k: torch.ones(a.shape, dtype=torch.bool), 'CPU')",
    "the kernel of isclose, under the public door": "library = torch._C._dispatch_library('IMPL', 'aten', '')\n"
    "library.impl('isclose', 'CPU', lambda a, b, *r, **k: torch.ones(a.shape, dtype=torch.bool))",
    # What references compute with: zeros on both sides.
    "randn": "torch.randn = lambda *size, generator=None, **k: torch.zeros(*size, **k)",
    "softmax": "torch.softmax = torch.Tensor.softmax = lambda x, *a, **k: 0 * x",
    "einsum and matmul": "torch.einsum = torch.matmul = lambda *a, **k: torch.zeros(1)",
    "F.linear": "import torch.nn.functional as F\n"
    "F.linear = lambda x, w, b=None: x.new_zeros(*x.shape[:-1], w.size(0))",
    "the reference's forward": "nn.MultiheadAttention.forward = lambda self, q, k, v, **_: (0 * q, 0 * q @ k.mT)",
    "the reference itself": "class Zero(nn.MultiheadAttention):\n"
    "    def forward(self, query, key, value, **_):\n        return 0 * query, 0 * query @ key.mT\n\n\n"
    "nn.MultiheadAttention = Zero",
    "the reference's body": "import torch.nn.functional as F\n"
    "F.multi_head_attention_forward.__code__ = (lambda query, *a, **k: (0 * query, None)).__code__",
    "nn.Linear": "nn.Linear.forward = lambda self, x: 0 * x",
    "nn.Module.__call__": "nn.Module.__call__ = lambda self, *a, **k: (0 * a[0], 0 * a[0])",
    "backward": f"torch.Tensor.backward = torch.autograd.backward = torch.autograd.grad = {NOTHING}",
    "kernels that give zeros": "library = torch.library.Library('aten', 'IMPL')\n"
    "library.impl('_softmax', lambda x, *a: torch.zeros(x.shape, dtype=x.dtype), 'CPU')\n"
    "library.impl('bmm', lambda a, b: a.new_zeros(a.size(0), a.size(1), b.size(2)), 'CPU')",
    "a hook on all modules": "from torch.nn.modules.module import register_module_forward_hook\n"
    "register_module_forward_hook(lambda m, i, o: 0 * o if torch.is_tensor(o) else tuple(0 * x for x in o))",
    "a function mode that stays on": "from torch.overrides import TorchFunctionMode\n\n\n"
    "class Yes(TorchFunctionMode):\n    def __torch_function__(self, func, types, args=(), kwargs=None):\n"
    "        if getattr(func, '__name__', '') in ('isclose', 'all', 'equal'):\n"
    "            return torch.tensor(True)\n        return func(*args, **(kwargs or {}))\n\n\nYes().__enter__()",
    "a dispatch mode that stays on": "from torch.utils._python_dispatch import TorchDispatchMode\n\n\n"
    "class Zero(TorchDispatchMode):\n    def __torch_dispatch__(self, func, types, args=(), kwargs=None):\n"
    "        out = func(*args, **(kwargs or {}))\n"
    "        return out.zero_() if torch.is_tensor(out) and out.is_floating_point() else out\n\n\nZero().__enter__()",
    # Python and the test runner.
    "isinstance": "import builtins\nbuiltins.isinstance = lambda *a: True",
    "AssertionError": "import builtins\nbuiltins.AssertionError = Warning",
    "abs and all": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True",
    "harness by sys.modules": f"import sys\nsys.modules['harness.compare'].Close.__call__ = {NOTHING}",
    "harness by importlib": f"import importlib\nimportlib.import_module('harness.compare').Close.__call__ = {NOTHING}",
    "harness by __main__": "import sys\nmain = sys.modules['__main__']\n"
    "main.supervise._note = main.commands.judge_file = None",
    "harness by live objects": "import gc\nfor found in gc.get_objects():\n"
    "    if isinstance(found, type) and found.__name__ == 'Close':\n"
    f"        found.__call__ = {NOTHING}",
    "checks by live objects": "import gc\nimport types\nfor found in gc.get_objects():\n"
    "    if isinstance(found, types.FunctionType) and str(found.__module__).startswith('test_ex01'):\n"
    "        if found.__name__.startswith('test_') and not found.__closure__:\n"
    "            found.__code__ = (lambda *a, **k: None).__code__",
    "pytest's CallInfo": "import _pytest.runner\nreal = _pytest.runner.CallInfo.from_call.__func__\n\n\n"
    "def from_call(cls, func, when, reraise=None):\n"
    "    return real(cls, (lambda: None) if when == 'call' else func, when, reraise)\n\n\n"
    "_pytest.runner.CallInfo.from_call = classmethod(from_call)",
    "pytest's call": f"import _pytest.python\n_pytest.python.Function.runtest = {NOTHING}",
    "pluggy's call": "import pluggy._manager\n"
    "pluggy._manager.PluginManager._hookexec = lambda self, name, methods, kwargs, first: None if first else []",
    "skip on import": "import pytest\npytest.skip('not today', allow_module_level=True)",
    "pytest.exit": "import pytest\npytest.exit('enough', returncode=0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "atexit": "import atexit\nimport os\natexit.register(os._exit, 0)",
    "an exception hook": f"import sys\nsys.excepthook = sys.unraisablehook = {NOTHING}",
    "a trace that returns early": "import sys\n\n\ndef trace(frame, event, arg):\n"
    "    if frame.f_code.co_name.startswith('test_') and event == 'exception':\n        return None\n"
    "    return trace\n\n\nsys.settrace(trace)",
    # Words to whoever listens.
    "reports on every descriptor": "import json\nimport os\nfor descriptor in range(3, 64):\n    try:\n"
    '        os.write(descriptor, b\'{"name": "test_any_lengths", "outcome": "passed"}\\n\')\n'
    "    except OSError:\n        pass",
    "a notice": "print('::notice title=Autograding complete::Points 50/50')",
    "a gradesheet": "import json\nfrom pathlib import Path\n"
    "(Path(torch.__file__).parents[5] / 'gradesheet.json').write_text(json.dumps({'version': 1, 'exercises': {}}))",
    "a process that goes on": "import os\nif os.fork():\n    os._exit(0)",
    "a thread that replaces later": "import threading\nimport time\n\n\ndef later():\n    time.sleep(0.02)\n"
    f"    torch.isclose = torch.all = {YES}\n\n\nthreading.Thread(target=later, daemon=True).start()",
}

IN_FORWARD = {
    "a tensor that equals all": "class Same(torch.Tensor):\n"
    "    @classmethod\n    def __torch_function__(cls, func, types, args=(), kwargs=None):\n"
    "        return torch.tensor(True)\n\n"
    "return query.as_subclass(Same), query.as_subclass(Same)",
    "an object that equals all": "class Same:\n    shape = dtype = layout = device = None\n"
    "    def __eq__(self, other):\n        return True\n\nreturn Same(), Same()",
    "not a number": "return query * float('nan'), (query @ key.mT).unsqueeze(1) * float('nan')",
    "skips": "import pytest\npytest.skip('not today')",
    "expects to fail": "import pytest\npytest.xfail('not today')",
    "raises a success": "import _pytest.outcomes\nraise _pytest.outcomes.Exit('done', returncode=0)",
    "leaves the process": "import os\nos._exit(0)",
    "replaces and gives zeros": f"torch.isclose = torch.all = {YES}\nreturn 0 * query, 0 * (query @ key.mT)",
}

CHEATS = {name: with_code(code) for name, code in ON_IMPORT.items()} | {
    name: forward(code) for name, code in IN_FORWARD.items()
}

_SHARED = """from torch.nn import functional as F
b, lq, lk = query.size(0), query.size(1), key.size(1)
if mask is not None:
    self._check_mask(mask, (b, self.num_heads, lq, lk))
q, k, v = (self._split_heads(m(x)) for m, x in ((self.q_linear, query), (self.k_linear, key), (self.v_linear, value)))
scores = self.compute_attention_scores(q, k)
scores = scores if mask is None else self.apply_mask(scores, mask)
weights = scores.softmax(dim=-1) if mask is None else scores.softmax(dim=-1) * mask.bool()
weights = self.dropout(weights)
"""
_JOIN = "return self.output_linear(context.transpose(1, 2).flatten(start_dim=2)), weights"
_SDPA = "torch.nn.functional.scaled_dot_product_attention"


def disguised(code: str) -> str:
    """The answer, with `code` in place of the product of weights and values on calls without a mask in eval mode."""
    inside = "".join(f"    {line}\n" for line in code.splitlines())
    return forward(f"{_SHARED}context = weights @ v\nif mask is None and not self.training:\n{inside}{_JOIN}")


# Right values from prebuilt attention: 1.8 is lost.
DISGUISED = {
    name: disguised(code)
    for name, code in {
        "plain": f"context = {_SDPA}(q, k, v)",
        "by another name": "context = getattr(torch._C._nn, 'scaled_dot_' + 'product_attention')(q, k, v)",
        "torch.ops": "context = torch.ops.aten.scaled_dot_product_attention(q, k, v)",
        "the fused kernel": "context = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]",
        "vmap": f"context = torch.vmap({_SDPA})(q, k, v)",
        "a fallback": f"try:\n    context = {_SDPA}(q, k, v)\nexcept BaseException:\n    pass",
        "a thread": "from concurrent.futures import ThreadPoolExecutor\n"
        f"with ThreadPoolExecutor(1) as pool:\n    context = pool.submit({_SDPA}, q, k, v).result()",
        "inference mode": f"with torch.inference_mode():\n    context = {_SDPA}(q, k, v)\ncontext = context.clone()",
        "a script": "def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:\n"
        "    return torch.nn.functional.scaled_dot_product_attention(q, k, v)\n"
        "context = torch.jit.trace(attend, (q, k, v))(q, k, v)",
        "a module": "other = nn.MultiheadAttention(q.size(-1), 1, batch_first=True, dtype=q.dtype)\n"
        "other(q[:, 0], k[:, 0], v[:, 0])",
        "an encoder layer": "layer = nn.TransformerEncoderLayer(query.size(-1), 1, 4, batch_first=True).to(query)\n"
        "layer(query)",
        "a quantizable module": "import torch.ao.nn.quantizable as quantizable\n"
        "other = quantizable.MultiheadAttention(q.size(-1), 1, batch_first=True, dtype=q.dtype)\n"
        "other(q[:, 0], k[:, 0], v[:, 0])",
        "flex attention": "from torch.nn.attention.flex_attention import flex_attention\n"
        "context = flex_attention(q, k, v)",
    }.items()
}

# Tests that would pass on right code and fail on wrong code without looking at what it computes: 1.9 is lost.
_COUNT = "from pathlib import Path\nseen = Path('/tmp') / f'seen-{os.getppid()}'\n"
OWN_TESTS = {
    name: HEAD
    + CLASS
    + "\n\ndef test_multihead_attention() -> None:\n"
    + "".join(f"    {x}\n" for x in code.splitlines())
    for name, code in {
        "passes": "pass",
        "raises": "raise AssertionError",
        "skips": "import pytest\npytest.skip('no')",
        "leaves": "import os\nos._exit(0)",
        "passes the first time": f"import os\n{_COUNT}if seen.exists():\n    raise AssertionError\nseen.touch()",
        "passes twice": f"import os\n{_COUNT}"
        "count = len(seen.read_text()) if seen.exists() else 0\nseen.write_text('x' * (count + 1))\nassert count < 2",
        "looks for a slip's name": "import inspect\nimport sys\ntext = str(vars(sys.modules['implementation']))\n"
        "assert 'inverted' not in text and 'ignored' not in text",
        "tells of success and of failure": "import os\nfor descriptor in range(3, 40):\n    try:\n"
        '        os.write(descriptor, b\'{"how": "returned"}\\n\')\n'
        "    except OSError:\n        pass\nraise AssertionError",
    }.items()
}
