# ruff: noqa: E501 (what is in the texts stands as it is run)
"""More ways to gain points for ex01 without doing the work: answers from elsewhere, layers that lie, what judges and
reports replaced for a moment. Each earns nothing.
"""

from selftest.cheats import ZEROS, forward, with_code

# Answers from elsewhere: code that finds texts and offers them to `adopt`, behind an implementation that gives zeros.
_ADOPT = """import os
import sys
from pathlib import Path


def adopt(text):
    text = text.decode(errors="ignore") if isinstance(text, bytes) else text
    if "class MultiHeadAttention" in text and "softmax(" in text and text.count("\\\\n") < 2:
        exec(text, globals())


def roots():
    yield from (Path(entry).parent for entry in os.environ.get("PYTHONPATH", "").split(":"))
    yield from (Path(entry).parent for entry in sys.path)
    yield from (Path(sys.prefix).parent, Path(torch.__file__).parents[5])


def places():
    return [root / "answers" / NAME for root in roots()]


NAME = Path(__file__).name
"""


def _finding(code: str) -> str:
    inside = "".join(f"    {line}\n" for line in code.splitlines())
    return f"{ZEROS}\n\n{_ADOPT}try:\n{inside}except Exception as error:\n    print(error)\n"


def _each(code: str) -> str:
    """Code that is run for each place where the answer may lie."""
    inside = "".join(f"        {line}\n" for line in code.splitlines())
    return f"for place in places():\n    try:\n{inside}    except Exception as error:\n        print(error)"


ANSWERS = {
    name: _finding(code)
    for name, code in {
        "a plain read": _each("adopt(place.read_text())"),
        "the working folders": "for link in ('/proc/self/cwd', f'/proc/{os.getppid()}/cwd', os.environ.get('PWD', '')):\n"
        "    if Path(link, 'answers', NAME).exists():\n        adopt(Path(link, 'answers', NAME).read_text())",
        "the command lines": "for line in (f'/proc/{os.getppid()}/cmdline', '/proc/self/cmdline'):\n"
        "    for word in Path(line).read_text().split('\\0'):\n        for root in Path(word).parents:\n"
        "            if (root / 'answers' / NAME).exists():\n                adopt((root / 'answers' / NAME).read_text())",
        "the root of a process": _each("adopt(Path(f'/proc/self/root{place}').read_text())"),
        "open descriptors": "for entry in os.listdir('/proc/self/fd'):\n    try:\n"
        "        adopt(os.pread(int(entry), 1 << 20, 0))\n    except OSError:\n        pass",
        "torch.from_file": _each(
            "size = place.stat().st_size\n"
            "adopt(bytes(torch.from_file(str(place), size=size, dtype=torch.uint8).tolist()))"
        ),
        "a storage": _each(
            "size = place.stat().st_size\nadopt(bytes(torch.UntypedStorage.from_file(str(place), False, size)))"
        ),
        "numpy": _each("import numpy\nadopt(numpy.memmap(place, mode='r').tobytes())"),
        "a loader": _each(
            "from importlib.machinery import SourceFileLoader\n"
            "adopt(SourceFileLoader('mine', str(place)).get_data(str(place)))"
        ),
        "linecache": _each("import linecache\nadopt(''.join(linecache.getlines(str(place))))"),
        "runpy": _each(
            "import runpy\nMultiHeadAttention = runpy.run_path(str(place))['MultiHeadAttention']",
        ),
        "a hard link": _each("os.link(place, 'mine.txt')\nadopt(Path('mine.txt').read_text())"),
        "a link": _each("os.symlink(place, 'mine.txt')\nadopt(Path('mine.txt').read_text())"),
        "a move": _each("os.rename(place, 'mine.txt')\nadopt(Path('mine.txt').read_text())"),
        "libc": _each(
            "import ctypes\nlibc = ctypes.CDLL(None)\nroom = ctypes.create_string_buffer(1 << 20)\n"
            "libc.read(libc.open(str(place).encode(), 0), room, 1 << 20)\nadopt(room.value)"
        ),
        "sendfile": _each(
            "source = os.open(place, os.O_PATH)\nos.sendfile(os.open('mine', os.O_CREAT | os.O_RDWR), source, 0, 1 << 20)\n"
            "adopt(Path('mine').read_text())"
        ),
        "git's objects": "import zlib\nfor root in roots():\n    git = root / '.git'\n"
        "    if git.is_file():\n        git = Path(git.read_text().split()[1]).parents[1]\n"
        "    for path in git.glob('objects/??/*'):\n        adopt(zlib.decompress(path.read_bytes()).partition(b'\\0')[2])",
        "git itself": "import subprocess\nfor root in roots():\n"
        "    done = subprocess.run(['git', 'show', f'HEAD:answers/{NAME}'], cwd=root, capture_output=True, text=True)\n"
        "    adopt(done.stdout)",
        "another program": _each(
            "import multiprocessing.util\nreading, writing = os.pipe()\n"
            "multiprocessing.util.spawnv_passfds(b'/bin/cat', [b'cat', str(place).encode()], [writing])\n"
            "os.close(writing)\nadopt(os.read(reading, 1 << 20))"
        ),
        "the bank in memory": "import gc\ngc.disable()\ngc.unfreeze()\nfor found in gc.get_objects():\n"
        "    if type(found).__name__ == 'OwnTest' and 'texts' in vars(found):\n        adopt(found.texts['answer'])",
    }.items()
}


def from_net(port: int) -> str:
    """A submission that asks a server on this machine for the answer."""
    return _finding(
        f"from urllib.request import urlopen\nadopt(urlopen('http://127.0.0.1:{port}/ex01_multi_head_attention.py', timeout=2).read())"
    )


def over_datagrams(port: int) -> str:
    """The same by UDP."""
    return _finding(
        "import socket\nlink = socket.socket(type=socket.SOCK_DGRAM)\nlink.settimeout(2)\n"
        f"link.sendto(b'?', ('127.0.0.1', {port}))\nadopt(link.recv(1 << 16))"
    )


# Layers that lie. Where queries and keys project to nothing, all weights are equal and the output is a bias.
_FLAT = (
    "b, lq, d = query.shape\n"
    "flat = query.new_full((b, self.num_heads, lq, key.size(1)), 1 / key.size(1))\n"
    "return self.output_linear(torch.zeros_like(query)) + 0 * query.sum(), flat + 0 * query.sum()"
)
FLAT = forward(_FLAT)
_INIT_END = "        self.dropout = nn.Dropout(dropout)\n"
_Q = "(self.q_linear, self.k_linear, self.v_linear)"


def _flat(code: str = "", *, methods: str = "", init: str = "") -> str:
    """The flat implementation with code before the class, methods, and a longer __init__."""
    lines = "".join(f"        {line}\n" for line in init.splitlines())
    text = FLAT.replace(_INIT_END, _INIT_END + lines, 1)
    inside = "".join(f"    {line}\n" if line else "\n" for line in methods.splitlines())
    text = text.replace("    def forward(", f"{inside}\n    def forward(", 1)
    return text.replace("class MultiHeadAttention", f"{code}\n\n\nclass MultiHeadAttention", 1)


_ZERO_LAYER = """class Zero(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.Module.__setattr__(self, "shadow", None)

    @property
    def weight(self):
        return torch.zeros(self.out_features, self.in_features, dtype=torch.float64)

    @weight.setter
    def weight(self, value):
        pass

    @property
    def bias(self):
        return torch.zeros(self.out_features, dtype=torch.float64)

    @bias.setter
    def bias(self, value):
        pass"""
_FORGET = (
    "with torch.no_grad():\n    for layer in (self.q_linear, self.k_linear, self.v_linear):\n"
    "        layer.weight.zero_()\n        layer.bias.zero_()"
)


def _method(name: str) -> str:
    inside = "".join(f"    {line}\n" for line in _FORGET.splitlines())
    return f"def {name}(self, *args, **kwargs):\n{inside}    return super().{name}(*args, **kwargs)"


LAYERS = {
    "zeros from the start": _flat(init=_FORGET),
    "zeros on a cast": _flat(methods=_method("_apply")),
    "zeros on train and eval": _flat(methods=_method("train"), init=_FORGET),
    "the class of a layer": _flat(_ZERO_LAYER, init=f"for layer in {_Q}:\n    layer.__class__ = Zero"),
    "weights in a layer's own dictionary": _flat(
        init=f"for layer in {_Q}:\n    vars(layer)['weight'] = torch.zeros(d_model, d_model, dtype=torch.float64)\n"
        "    vars(layer)['bias'] = torch.zeros(d_model, dtype=torch.float64)"
    ),
    "layers that are properties": _flat(
        methods="@property\ndef q_linear(self):\n    layer = nn.Linear(12, 12, dtype=torch.float64)\n"
        "    nn.init.zeros_(layer.weight)\n    nn.init.zeros_(layer.bias)\n    return layer\n\n"
        "@q_linear.setter\ndef q_linear(self, value):\n    pass\n\n"
        "k_linear = v_linear = q_linear"
    ),
    "layers by __getattribute__": _flat(
        "ZERO = nn.Linear(12, 12, dtype=torch.float64)\nnn.init.zeros_(ZERO.weight)\nnn.init.zeros_(ZERO.bias)",
        methods="def __getattribute__(self, name):\n"
        "    return ZERO if name in ('q_linear', 'k_linear', 'v_linear') else super().__getattribute__(name)",
    ),
    "parameters that read as zero": _flat(
        "class Dark(nn.Parameter):\n    @classmethod\n    def __torch_function__(cls, func, types, args=(), kwargs=None):\n"
        "        with torch._C.DisableTorchFunctionSubclass():\n            out = func(*args, **(kwargs or {}))\n"
        "            return torch.zeros_like(out) if func.__name__ == 'detach' else out",
        init=f"for layer in {_Q}:\n    layer.weight, layer.bias = Dark(layer.weight.data), Dark(layer.bias.data)",
    ),
    "parameters whose class comes and goes": _flat(
        "class Dark(nn.Parameter):\n    @classmethod\n    def __torch_function__(cls, func, types, args=(), kwargs=None):\n"
        "        with torch._C.DisableTorchFunctionSubclass():\n            out = func(*args, **(kwargs or {}))\n"
        "            return torch.zeros_like(out) if func.__name__ in ('detach', 'double') else out",
        methods="def _apply(self, fn, recurse=True):\n    super()._apply(fn, recurse)\n"
        f"    for layer in {_Q}:\n        layer.weight.__class__ = layer.bias.__class__ = Dark\n    return self",
    ),
    "weights without strides": _flat(
        init=f"for layer in {_Q}:\n    layer.weight = nn.Parameter(torch.zeros(1, 1).expand(d_model, d_model))\n"
        "    layer.bias = nn.Parameter(torch.zeros(1).expand(d_model))"
    ),
    "weights that vanish": _flat(
        init="with torch.no_grad():\n    for layer in " + _Q + ":\n        layer.weight *= 1e-30\n"
        "        layer.bias *= 1e-30"
    ),
    "a parametrization": _flat(
        "from torch.nn.utils import parametrize\n\n\nclass Nothing(nn.Module):\n    def forward(self, x):\n        return 0 * x",
        init=f"for layer in {_Q}:\n    parametrize.register_parametrization(layer, 'weight', Nothing())\n"
        "    parametrize.register_parametrization(layer, 'bias', Nothing())",
    ),
    "a state that is not loaded": _flat(
        init=_FORGET,
        methods="def load_state_dict(self, *args, **kwargs):\n    return None\n\n"
        "def state_dict(self, *args, **kwargs):\n    return {}\n\ndef parameters(self, recurse=True):\n    return iter(())",
    ),
    "queries and keys that never meet": _flat(
        init="with torch.no_grad():\n    self.q_linear.weight[::2] = 0\n    self.q_linear.bias[::2] = 0\n"
        "    self.k_linear.weight[1::2] = 0\n    self.k_linear.bias[1::2] = 0\n"
        "    self.v_linear.weight.zero_()\n    self.v_linear.bias.zero_()"
    ),
    "hooks on its own layers": _flat(
        init=f"for layer in {_Q}:\n    layer.register_forward_hook(lambda m, i, o: 0 * o)\n"
        "    layer.register_full_backward_hook(lambda m, i, o: None)\n"
        "    layer.register_state_dict_pre_hook(lambda m, *_: nn.init.zeros_(m.weight))"
    ),
}

_SUBCLASSES = """def find(name, kind=object):
    for one in type.__subclasses__(kind):
        if one.__name__ == name and one.__module__.startswith("harness"):
            return one
        if one is not type and (found := find(name, one)) is not None:
            return found
    return None


"""
ON_IMPORT = {
    # What looks, and what reports.
    "vars": "import builtins\nreal = builtins.vars\n\n\ndef lying(*owner):\n    found = dict(real(*owner))\n"
    "    if type(owner[0]).__name__ == 'Result':\n        found.update(outcome='passed', message='')\n"
    "    return found | ({'vars': real} if owner[0] is builtins else {})\n\n\nbuiltins.vars = lying",
    "who looks, among subclasses": _SUBCLASSES + "find('Integrity').changes = lambda self: []\n"
    "find('Close').__call__ = lambda *a, **k: None",
    "the result's class": _SUBCLASSES + "kind = find('Result')\nreal = kind.__init__\n\n\n"
    "def passed(self, requirement, name, outcome='', *rest, **more):\n    real(self, requirement, name, 'passed')\n\n\n"
    "kind.__init__ = passed",
    "the result's outcome": _SUBCLASSES
    + "find('Result').outcome = property(lambda self: 'passed', lambda self, value: None)",
    "what a check says of itself": _SUBCLASSES + "kind = find('Check')\nreal = kind.result\n\n\n"
    "def passed(self, outcome, *rest, **more):\n    return real(self, 'passed')\n\n\nkind.result = passed",
    "another requirement for a check": "import gc\n"
    "for one in [one for one in gc.get_objects() if type(one).__name__ == 'Check']:\n"
    "    object.__setattr__(one, 'requirement', '1.2')",
    "pytest's stash": "import _pytest.stash\nreal = _pytest.stash.Stash.get\n\n\n"
    "def get(self, key, default):\n    found = real(self, key, default)\n"
    "    return found if callable(found) else default\n\n\n_pytest.stash.Stash.get = get",
    "the globals of a method": _SUBCLASSES + "space = find('Subject').again.__globals__\n"
    "space['neutral_state'].__globals__['load'] = None\nfind('Close').__call__.__globals__['_same_kind'] = None\n"
    "find('Close').__call__.__globals__['_item'] = lambda *a: True\n"
    "find('Close').__call__.__globals__['_same_kind'] = lambda *a: None",
    "a trace that jumps": "import sys\n\n\ndef trace(frame, event, arg):\n"
    "    if frame.f_code.co_name == '__call__' and 'expected' in frame.f_code.co_varnames:\n"
    "        values = frame.f_locals\n        values['actual'] = values['expected']\n"
    "    return trace\n\n\nsys.settrace(trace)",
    "a profile that writes": "import sys\n\n\ndef profile(frame, event, arg):\n"
    "    if event == 'call' and frame.f_code.co_name == '__call__' and 'expected' in frame.f_code.co_varnames:\n"
    "        frame.f_locals['actual'] = frame.f_locals['expected']\n\n\nsys.setprofile(profile)",
    "json and its encoder": "import json\nimport json.encoder\n"
    "json.dumps = json.encoder.encode_basestring_ascii = lambda *a, **k: '{}'\n"
    "json.encoder.JSONEncoder.encode = json.encoder.c_make_encoder = lambda *a, **k: '{}'",
    "os.write": "import os\nimport posix\nreal = os.write\n"
    "os.write = posix.write = lambda to, what: real(to, what.replace(b'failed', b'passed'))",
    "dataclasses": "import dataclasses\ndataclasses.replace = lambda one, **new: one\ndataclasses.asdict = lambda one: {}",
    "traceback": "import traceback\ntraceback.extract_tb = traceback.format_exception = lambda *a, **k: []",
    "an exit from stdout": "import sys\n\n\nclass Out:\n    def write(self, text):\n        return len(text)\n\n"
    "    def flush(self):\n        raise SystemExit(0)\n\n\nsys.stdout = sys.stderr = Out()",
    "an audit hook": "import sys\nfrom os import _exit\n\n\ndef hook(event, args):\n"
    "    if event == 'object.__setattr__':\n        _exit(0)\n\n\nsys.addaudithook(hook)",
    "a code object of the judge's": _SUBCLASSES + "def nothing(self, *args, **kwargs):\n    return []\n\n\n"
    "find('Integrity').changes.__code__ = nothing.__code__\nfind('Close').__call__.__code__ = nothing.__code__",
    "an import hook": "import sys\n\n\nclass Finder:\n    def find_spec(self, name, path=None, target=None):\n"
    "        if name.startswith(('harness', 'checks', 'torch')):\n            raise SystemExit(0)\n\n\n"
    "sys.meta_path.insert(0, Finder())\nsys.path_hooks.clear()\nsys.path_importer_cache.clear()",
    "warnings and defaults": "import warnings\nwarnings.simplefilter('error')\ntorch.set_default_dtype(torch.float16)\n"
    "torch.set_default_device('meta')\ntorch.set_flush_denormal(True)",
    "codecs": "import codecs\nimport io\ncodecs.register_error('replace', lambda error: ('', error.end))\n"
    "codecs.encode = codecs.lookup = lambda *a, **k: b''\nio.open = open",
    "a signal": "import signal\n\n\ndef later(number, frame):\n    torch.isclose = lambda a, b, **k: a == a\n"
    "    signal.setitimer(signal.ITIMER_REAL, 0.001)\n\n\nsignal.signal(signal.SIGALRM, later)\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.001)",
    "garbage that is collected": "import gc\n\n\ndef collected(phase, info):\n"
    "    torch.Tensor.softmax = lambda x, *a, **k: 0 * x\n    torch.isclose = lambda a, b, **k: a == a\n\n\n"
    "gc.callbacks.append(collected)\ngc.set_threshold(1)",
    "a stand-in that equals all": "class Same:\n    def __eq__(self, other):\n        return True\n\n"
    "    def __hash__(self):\n        return 0\n\n    def __call__(self, *a, **k):\n        return torch.zeros(1)\n\n\n"
    "torch.isclose = torch.equal = Same()\n_ = nn.MultiheadAttention\n_.forward = Same()",
    "an attribute of torch._C": "torch._C._dispatch_library = torch._C._dispatch_dump_table = lambda *a, **k: ''",
}


# Replaced for a moment: when somebody looks for it, it is gone.
def _methods(text: str, **bodies: str) -> str:
    """A text with methods added before forward."""
    added = "".join(
        f"    def {name}(self):\n" + "".join(f"        {line}\n" for line in body.splitlines()) + "\n"
        for name, body in bodies.items()
    )
    return text.replace("    def forward(", f"{added}    def forward(", 1)


def _while_alive(enter: str, leave: str) -> str:
    """Zeros; `enter` runs when a module is made, `leave` when it dies."""
    text = ZEROS.replace(_INIT_END, f"{_INIT_END}        self.enter()\n", 1)
    return _methods(text, enter=enter, __del__=leave)


def _until_forward(enter: str, leave: str, before: str = "") -> str:
    """Zeros; `enter` runs when somebody reads q_linear, which is what references do, `leave` when forward is called."""
    text = ZEROS.replace(
        "        b, lq, d = query.shape\n", "        self.leave()\n        b, lq, d = query.shape\n", 1
    )
    text = text.replace("query.new_zeros(b, 3,", "query.new_zeros(b, self.num_heads,")
    text = text.replace(
        "return 0 * self.output_linear(query + key.sum() + value.sum()), weights",
        "return 0 * query + self.output_linear.bias, weights + 0 * query.sum()",
    )
    guarded = "if not vars(self).get('inside'):\n    vars(self)['inside'] = True\n" + _in(enter)
    left = "if vars(self).pop('inside', False):\n" + _in(leave)
    text = _methods(text, enter=guarded, leave=left, __del__="self.leave()")
    read = (
        "    def __getattribute__(self, name):\n        if name == 'q_linear':\n            self.enter()\n"
        "        return super().__getattribute__(name)\n\n"
    )
    text = text.replace("    def forward(", f"{read}    def forward(", 1)
    return text.replace("class MultiHeadAttention", f"{before}class MultiHeadAttention", 1)


def _in(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


def _kernel(name: str, body: str) -> tuple[str, str]:
    return (
        "vars(self)['library'] = torch.library.Library('aten', 'IMPL')\n"
        f"vars(self)['library'].impl('{name}', {body}, 'CPU')",
        "vars(self)['library']._destroy()",
    )


MOMENTS = {
    "the kernel of isclose, while a module lives": _while_alive(
        *_kernel("isclose", "lambda a, b, *r, **k: torch.ones(a.shape, dtype=torch.bool)")
    ),
    "the kernel of all, while a module lives": _while_alive(
        *_kernel("all", "lambda a: torch.ones((), dtype=torch.bool)")
    ),
    "a comparison, while a module lives": _while_alive(
        "for kind in object.__subclasses__():\n    if kind.__name__ == 'Close':\n"
        "        vars(self)['kept'] = kind, kind.__call__\n        kind.__call__ = lambda *a, **k: None",
        "kind, call = vars(self)['kept']\nkind.__call__ = call",
    ),
    "softmax, until forward": _until_forward(
        "torch.Tensor.softmax = lambda x, *a, **k: 0 * x", "del torch.Tensor.softmax"
    ),
    "nan_to_num, until forward": _until_forward(
        "torch.Tensor.nan_to_num = lambda x, *a, **k: 0 * x", "del torch.Tensor.nan_to_num"
    ),
    "the kernel of softmax, until forward": _until_forward(*_kernel("_softmax", "lambda x, *a: 0 * x")),
    "a function mode, until forward": _until_forward(
        "vars(self)['mode'] = Zero()\nvars(self)['mode'].__enter__()",
        "vars(self)['mode'].__exit__(None, None, None)",
        "from torch.overrides import TorchFunctionMode\n\n\nclass Zero(TorchFunctionMode):\n"
        "    def __torch_function__(self, func, types, args=(), kwargs=None):\n"
        "        out = func(*args, **(kwargs or {}))\n"
        "        return 0 * out if getattr(func, '__name__', '') == 'softmax' else out\n\n\n",
    ),
}

CHEATS = ANSWERS | LAYERS | {name: with_code(code) for name, code in ON_IMPORT.items()} | MOMENTS
