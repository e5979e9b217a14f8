# ruff: noqa: E501 (what is in the texts stands as it is run)
"""Right values for ex01 from prebuilt attention, reached by other doors: 1.8 is lost."""

from selftest.cheats import disguised

_SDPA = "torch.nn.functional.scaled_dot_product_attention"
_MATH = "torch.ops.aten._scaled_dot_product_attention_math"
_NO_MODES = "with torch._C.DisableTorchFunction():\n"
_EMBED = "d = q.size(-1)\none, none = torch.eye(d, dtype=q.dtype), torch.zeros(3 * d, dtype=q.dtype)\n"
# multi_head_attention_forward's body, with projections that change nothing, called as `copy`.
_CALL = (
    _EMBED + "rows = [x.flatten(0, 1).transpose(0, 1) for x in (q, k, v)]\n"
    "with torch._C.DisableTorchFunction():\n"
    "    out = copy(*rows, d, 1, torch.cat([one] * 3), none, None, None, False, 0.0, one, none[:d], training=False)[0]\n"
    "context = out.transpose(0, 1).unflatten(0, q.shape[:2])"
)
_CUT = (
    "lines = text.split('def multi_head_attention_forward(')[1].split('\\ndef ')[0]\n"
    "space = dict(vars(F))\nexec('def copy(' + lines, space)\ncopy = space['copy']\n"
)
_FUNCTION = (
    "import types\ncode = next(c for c in code.co_consts if getattr(c, 'co_name', '') == 'multi_head_attention_forward')\n"
    "copy = types.FunctionType(code, vars(F))\n"
    "copy.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__\n"
    "copy.__defaults__ = (True, None, True, None, False, None, None, None, None, None, True, False)\n"
)
DISGUISED = {
    name: disguised(code)
    for name, code in {
        "decompose": f"context = {_MATH}.default.decompose(q, k, v)[0]",
        "the composite's key": f"key = torch._C.DispatchKey.CompositeImplicitAutograd\n"
        f"context = {_MATH}.default._op_dk(key, q, k, v)[0]",
        "the composite's kernel": "kernel = torch.library.get_kernel("
        "'aten::_scaled_dot_product_attention_math', 'CPU')\n"
        "keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)\n"
        "context = kernel.call_boxed(keys, q, k, v)[0]",
        "redispatch": f"keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)\n"
        f"context = {_MATH}.default.redispatch(keys, q, k, v)[0]",
        "vmap without modes": f"{_NO_MODES}    context = torch.vmap({_SDPA})(q, k, v)",
        "vmap of the math": f"{_NO_MODES}    context = torch.vmap({_MATH}.default)(q, k, v)[0]",
        "vmap in a thread": "from concurrent.futures import ThreadPoolExecutor\n"
        f"with ThreadPoolExecutor(1) as pool:\n    context = pool.submit(torch.vmap({_SDPA}), q, k, v).result()",
        "a vmap of a vmap": f"{_NO_MODES}    context = torch.vmap(torch.vmap({_SDPA}))(q, k, v)",
        "nested tensors": f"{_NO_MODES}    nested = [torch.nested.as_nested_tensor(list(x)) for x in (q, k, v)]\n"
        f"    context = torch.stack({_SDPA}(*nested).unbind())",
        "jagged tensors": "nested = [torch.nested.nested_tensor([y.transpose(0, 1) for y in x], layout=torch.jagged)"
        ".transpose(1, 2) for x in (q, k, v)]\n"
        f"context = torch.stack([y.transpose(0, 1) for y in {_SDPA}(*nested).transpose(1, 2).unbind()])",
        "a graph of fake tensors": "from torch.fx.experimental.proxy_tensor import make_fx\n"
        "from torch.nn.attention import SDPBackend, sdpa_kernel\n"
        f"with torch._C.DisableTorchFunction(), sdpa_kernel(SDPBackend.MATH):\n"
        f"    graph = make_fx({_SDPA}, tracing_mode='fake')(q, k, v)\ncontext = graph(q, k, v)",
        "a graph of the math": "from torch.fx.experimental.proxy_tensor import make_fx\n"
        f"{_NO_MODES}    graph = make_fx(lambda *x: {_MATH}.default(*x)[0], tracing_mode='fake')(q, k, v)\n"
        "context = graph(q, k, v)",
        "functionalize": f"{_NO_MODES}    context = torch.func.functionalize({_SDPA})(q, k, v)",
        "a derivative": f"{_NO_MODES}    context = torch.func.vjp({_SDPA}, q, k, v)[0]",
        "a tangent": f"{_NO_MODES}    context = torch.func.jvp({_SDPA}, (q, k, v), (q, k, v))[0]",
        "dual numbers": "from torch.autograd import forward_ad\n"
        f"with torch._C.DisableTorchFunction(), forward_ad.dual_level():\n"
        f"    context = forward_ad.unpack_dual({_MATH}.default(forward_ad.make_dual(q, q), k, v)[0]).primal",
        "negative views": f"{_NO_MODES}    context = {_MATH}.default(torch._neg_view(-q), k, v)[0]",
        "below autograd": f"with torch._C.DisableTorchFunction(), torch._C._AutoDispatchBelowAutograd():\n"
        f"    context = {_MATH}.default(q, k, v)[0]",
        "the python dispatcher": "from torch._dispatch.python import enable_python_dispatcher\n"
        f"with torch._C.DisableTorchFunction(), enable_python_dispatcher():\n    context = {_MATH}.default(q, k, v)[0]",
        "jit's own operation": "operation = torch._C._jit_get_operation('aten::_scaled_dot_product_attention_math')[0]\n"
        "context = operation(q, k, v)[0]",
        "a scripted graph": "graph = torch._C.parse_ir('graph(%q : Tensor, %k : Tensor, %v : Tensor):\\n'\n"
        "    '  %n : NoneType = prim::Constant()\\n  %z : float = prim::Constant[value=0.]()\\n'\n"
        "    '  %f : bool = prim::Constant[value=0]()\\n'\n"
        "    '  %o : Tensor = aten::scaled_dot_product_attention(%q, %k, %v, %n, %z, %f, %n, %f)\\n  return (%o)')\n"
        "context = torch._C._create_function_from_graph('attend', graph)(q, k, v)",
        "compiled eagerly": f"context = torch.compile({_SDPA}, backend='eager')(q, k, v)",
        "compiled ahead": "from torch.nn.attention import SDPBackend, sdpa_kernel\n"
        f"with sdpa_kernel(SDPBackend.MATH):\n    context = torch.compile({_SDPA}, backend='aot_eager')(q, k, v)",
        "an autograd function": "class Attend(torch.autograd.Function):\n    generate_vmap_rule = True\n\n"
        "    @staticmethod\n    def forward(q, k, v):\n        with torch._C.DisableTorchFunction():\n"
        f"            return {_SDPA}(q, k, v)\n\n    @staticmethod\n    def setup_context(ctx, inputs, output):\n"
        "        pass\n\n    @staticmethod\n    def backward(ctx, grad):\n        return grad, grad, grad\n\n"
        "context = torch.vmap(Attend.apply)(q, k, v)",
        "a custom operator": "name = f'mine{id(q)}::attend'\n"
        "@torch.library.custom_op(name, mutates_args=())\ndef attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:\n"
        f"    return {_SDPA}(q, k, v)\ncontext = attend(q, k, v)",
        "the native layer": _EMBED + "x = q[:, 0]\ntorch.ops.aten._native_multi_head_attention.default(\n"
        "    x, x, x, d, 1, torch.cat([one] * 3), none, one, none[:d])",
        "torch's source, by inspect": "import inspect\ntext = inspect.getsource(F)\n" + _CUT + _CALL,
        "torch's source, by its loader": "text = F.__loader__.get_source(F.__name__)\n" + _CUT + _CALL,
        "torch's source, by pkgutil": "import pkgutil\ntext = pkgutil.get_data('torch', 'nn/functional.py').decode()\n"
        + _CUT
        + _CALL,
        "torch's source, by bytes": "import os\ntext = open(os.fsencode(F.__file__)).read()\n" + _CUT + _CALL,
        "torch's source, from its folder": "import os\nkept = os.getcwd()\nos.chdir(os.path.dirname(F.__file__))\n"
        "text = open('functional.py').read()\nos.chdir(kept)\n" + _CUT + _CALL,
        "torch's source, by a link": "import os\nos.path.exists('mine') or os.symlink(F.__file__, 'mine')\n"
        "text = open('mine').read()\n" + _CUT + _CALL,
        "torch's source, by torch": "import os\nsize = os.path.getsize(F.__file__)\n"
        "text = bytes(torch.from_file(F.__file__, size=size, dtype=torch.uint8).tolist()).decode()\n" + _CUT + _CALL,
        "torch's code, by its loader": "code = F.__loader__.get_code(F.__name__)\n" + _FUNCTION + _CALL,
        "torch's code, from its cache": "import marshal\nfrom pathlib import Path\n"
        "code = marshal.loads(Path(F.__cached__).read_bytes()[16:])\n" + _FUNCTION + _CALL,
        "a second copy by runpy": "import runpy\ncopy = runpy.run_path(F.__file__)['multi_head_attention_forward']\n"
        + _CALL,
        "a second copy under another name": "import importlib.util\nimport sys\n"
        "spec = importlib.util.spec_from_file_location('torch.nn.mine', F.__file__)\n"
        "mine = importlib.util.module_from_spec(spec)\nsys.modules['torch.nn.mine'] = mine\n"
        "spec.loader.exec_module(mine)\ncopy = mine.multi_head_attention_forward\n" + _CALL,
        "a scripted function": "copy = torch.jit.script(F.multi_head_attention_forward)\n" + _CALL,
        "a scripted module": "other = nn.MultiheadAttention(q.size(-1), 1, batch_first=True, dtype=q.dtype)\n"
        "torch.jit.script(other)(q[:, 0], k[:, 0], v[:, 0])",
        "a helper that forks": "import multiprocessing\nfrom multiprocessing.pool import Pool\n"
        f"with multiprocessing.get_context('fork').Pool(1) as pool:\n    context = pool.apply({_SDPA}, (q, k, v))",
        "a helper before an exec": "import _posixsubprocess\nimport os\nimport sys\nreading, writing = os.pipe()\n"
        "def work():\n"
        "    text = F.__loader__.get_source(F.__name__)\n    global copy\n    space = dict(vars(F))\n"
        "    lines = text.split('def multi_head_attention_forward(')[1].split('\\ndef ')[0]\n"
        "    exec('def copy(' + lines, space)\n    copy = space['copy']\n"
        + "".join(f"    {line}\n" for line in _CALL.splitlines())
        + "    os.write(writing, context.detach().contiguous().numpy().tobytes())\n"
        "errors = os.pipe()\n"
        "pid = _posixsubprocess.fork_exec([b'no'], (b'/no',), True, (), None, None, -1, -1, -1, -1, -1, -1, errors[0],\n"
        "    errors[1], False, False, -1, None, None, None, -1, work, False)\n"
        "os.close(writing)\ndata = b''\nwhile chunk := os.read(reading, 1 << 16):\n    data += chunk\n"
        "context = torch.frombuffer(bytearray(data), dtype=q.dtype).reshape(q.shape)",
        "libc's fork": "import ctypes\nimport os\nreading, writing = os.pipe()\npid = ctypes.PyDLL(None).fork()\n"
        f"if pid == 0:\n    with torch._C.DisableTorchFunction():\n        context = torch.vmap({_SDPA})(q, k, v)\n"
        "    os.write(writing, context.detach().contiguous().numpy().tobytes())\n    os._exit(0)\n"
        "os.close(writing)\ndata = b''\nwhile chunk := os.read(reading, 1 << 16):\n    data += chunk\n"
        "context = torch.frombuffer(bytearray(data), dtype=q.dtype).reshape(q.shape)",
        "another package": "from huggingface_hub import constants\nassert constants",
    }.items()
}

# Kept from an earlier check, when nothing was forbidden: 1.6 comes before 1.8.
_KEEP = "import sys\nkept = sys.modules.setdefault('mine', type(sys)('mine'))\nF = nn.functional\n"
KEPT = {
    name: disguised("import sys\n" + use).replace(
        "class MultiHeadAttention", f"{_KEEP}{keep}\n\n\nclass MultiHeadAttention", 1
    )
    for name, (keep, use) in {
        "a code object": (
            "if not hasattr(kept, 'code'):\n    kept.code = F.multi_head_attention_forward.__code__\n"
            "    kept.defaults = F.multi_head_attention_forward.__defaults__",
            "import types\nkept = sys.modules['mine']\n"
            "copy = types.FunctionType(kept.code, vars(F), 'copy', kept.defaults)\n" + _CALL,
        ),
        "the door that forbids": (
            "if not hasattr(kept, 'door'):\n    kept.door = True\n    class Nothing:\n"
            "        def __getattr__(self, name):\n            return lambda *a, **k: None\n"
            "    torch._C._dispatch_library = lambda *a, **k: Nothing()",
            f"{_NO_MODES}    context = {_SDPA}(q, k, v)",
        ),
    }.items()
}
