"""What "from scratch" forbids: prebuilt attention raises and leaves a trace, however it is reached."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from harness.sandbox import audit

# A kernel is reached through the first of these when nothing asks for gradients, else through the second; by vmap, by
# nested tensors and by whoever asks for the composite through the others.
_KEYS = (
    "CPU",
    "AutogradCPU",
    "CompositeImplicitAutograd",
    "FuncTorchVmapMode",
    "NestedTensorCPU",
    "AutogradNestedTensor",
)
_ATTENTION_WORDS = (
    "scaled_dot_product",
    "_attention_forward",
    "multi_head_attention",
    "transformer_encoder_layer",
    "triton_scaled_dot",
)


class Forbidden(RuntimeError):
    """Raised in place of a forbidden operation."""


@dataclass(frozen=True)
class Prebuilt:
    """Operations that an exercise forbids.

    Args:
        operators: names of aten operators (without overload or with, as torch lists them), overridden in the
            dispatcher.
        functions: Python functions whose body is replaced, so that a name bound early is caught too.
        means: what "from scratch" is written with instead.
    """

    operators: tuple[str, ...]
    functions: tuple[Callable[..., Any], ...]
    means: str = "matrix products, softmax and their like"


@cache
def prebuilt_attention() -> Prebuilt:
    """Every attention that torch ships: its operators, and the functions and modules above them."""
    operators = tuple(
        name for name in _aten_operators() if any(word in name for word in _ATTENTION_WORDS) and "backward" not in name
    )
    functions: list[Callable[..., Any]] = [functional.multi_head_attention_forward, nn.MultiheadAttention.forward]
    functions += [kind.forward for kind in (nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer)]
    functions += [kind.forward for kind in (nn.TransformerDecoder, nn.TransformerDecoderLayer)]
    from torch.ao.nn.quantizable import MultiheadAttention as quantized
    from torch.nn.attention.flex_attention import flex_attention
    from torch.onnx.ops import _impl as onnx
    from torch.onnx.ops import attention

    dense = sys.modules["torch._higher_order_ops.flex_attention"]
    functions += [quantized.forward, quantized._forward_impl, flex_attention, dense.math_attention, dense.sdpa_dense]
    functions += [dense._math_attention_inner, attention, vars(onnx.attention_23)["_init_fn"]]
    return Prebuilt(operators, tuple(functions))


@contextmanager
def forbid(prebuilt: Prebuilt, what: str) -> Iterator[None]:
    """While inside, each forbidden operation raises Forbidden; on leaving, AssertionError names the first that
    `what` reached.

    An operation counts as reached also when the code under check caught the error.
    """
    reached: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(_Calls(prebuilt, reached))
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for operator in prebuilt.operators:
                for key in _KEYS:
                    library.impl(operator, _refusal(operator.split(".")[0], reached), key)
        for function in prebuilt.functions:
            stack.enter_context(_without_body(function, reached))
        try:
            yield
        except Exception as error:
            _fail_if(reached, prebuilt, what, error)
            raise
    _fail_if(reached, prebuilt, what)


def _fail_if(reached: list[str], prebuilt: Prebuilt, what: str, error: Exception | None = None) -> None:
    if found := [*reached, *audit.notes]:
        raise AssertionError(f"{what} reached {found[0]}; from scratch means {prebuilt.means}") from error


def _aten_operators() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("aten::") for name in names if name.startswith("aten::"))


def _refusal(name: str, reached: list[str]) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        reached.append(name)
        raise Forbidden(f"{name} is not to be used here")

    return refuse


class _Calls(TorchFunctionMode):
    """Sees calls from Python under any transformation: torch.func.vmap takes a way around the overridden kernels."""

    def __init__(self, prebuilt: Prebuilt, reached: list[str]) -> None:
        super().__init__()
        self._names = frozenset(operator.split(".")[0] for operator in prebuilt.operators)
        self._reached = reached

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in self._names:
            _refusal(name, self._reached)()
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_body(function: Callable[..., Any], reached: list[str]) -> Iterator[None]:
    """Replaces the body of a Python function: unlike a patched name, this reaches every reference to it."""
    assert isinstance(function, FunctionType)
    kept = function.__code__, function.__defaults__, function.__kwdefaults__
    function.__code__, function.__defaults__ = _refusing_body.__code__, None
    function.__kwdefaults__ = {"_refuse": _refusal(function.__qualname__, reached)}
    try:
        yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = kept


def _refusing_body(*args: Any, _refuse: Callable[..., Any], **kwargs: Any) -> Any:
    return _refuse(*args, **kwargs)
