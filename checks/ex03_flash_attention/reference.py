"""What the checks of ex03 share: sizes, builders, attention from the formula, and probes."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from harness.testing import Close, DispatchMode, Subject, is_tensor, seed

B, H, DH, BLOCK = 2, 3, 5, 4
D = H * DH
N = 2 * BLOCK  # Where lengths are not the point, they are equal and multiples of the block.
INF = float("inf")
CALL = "flash_attention_forward"
NEAR = 1e-5  # float64 where digits are not the point: they are 3.7's
WEIGHTS = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "o_proj.bias"]
HALVES = [torch.bfloat16, torch.float16]


def build(subject: Subject, block_size: int = BLOCK, dtype: torch.dtype = torch.float64) -> Any:
    """A seeded module of the learner's."""
    seed(1)
    return subject.FlashAttention(D, H, block_size).to(dtype)


def inputs(rng: torch.Generator, n: int = N, m: int = N, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Q, K and V, all different."""
    return [torch.randn(B, H, length, DH, generator=rng, dtype=torch.float64).to(dtype) for length in (n, m, m)]


def reference(given: Iterable[Tensor], mask: Tensor | None = None, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of Q, K and V in float64, from the formula."""
    q, k, v = (x.double() for x in given)
    scores = q @ k.mT / q.size(-1) ** 0.5
    allowed = None if mask is None else mask != 0
    if causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
        allowed = below if allowed is None else allowed & below
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -INF)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.clamp(min=0.5) @ v, (top + total.log()).squeeze(-1)  # 0.5: of a row that sees nothing


def pytorch(given: list[Tensor], causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """The output of torch's own attention."""
    q, k, v = given
    output: Tensor = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return output


def attend(
    attention: Any, given: list[Tensor], mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, if that is what flash_attention_forward gives."""
    options: dict[str, Any] = {} if mask is None else {"mask": mask}
    if causal:
        options["causal"] = True
    result = attention.flash_attention_forward(*given, **options)
    assert isinstance(result, tuple) and len(result) == 2, (
        f"{CALL}: a {type(result).__name__} came, the pair (output, logsumexp) was wanted"
    )
    return is_tensor(result[0], f"{CALL}: output"), is_tensor(result[1], f"{CALL}: logsumexp")


def agree(
    close: Close,
    attention: Any,
    given: list[Tensor],
    mask: Tensor | None = None,
    causal: bool = False,
    hint: str = "",
    tolerance: float = NEAR,
) -> tuple[Tensor, Tensor]:
    """The output and logsumexp of flash_attention_forward, which equal the formula's."""
    output, logsumexp = reference(given, mask=mask, causal=causal)

    actual = attend(attention, given, mask, causal)

    close(actual[0], output.detach().to(given[0].dtype), f"{CALL}: output", hint=hint, tolerance=tolerance)
    assert actual[1].dtype in (torch.float32, torch.float64), (
        f"{CALL}: logsumexp has {actual[1].dtype}, float32 or better was wanted"
    )
    close(actual[1].double(), logsumexp.detach(), f"{CALL}: logsumexp", hint=hint, tolerance=tolerance)
    return actual


def some_mask(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """A boolean mask in which every row allows and forbids something in each block of keys."""
    mask = torch.rand(shape, generator=rng) > 0.4
    mask[..., 1::BLOCK] = False
    mask[..., ::BLOCK] = True
    return mask


def standard(attention: Any, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """What forward gives, in float64, from the formula and the weights of the given linear layers."""
    heads = H if x.size(-1) == D else 1

    def project(linear: nn.Linear) -> Tensor:
        return (x.double() @ linear.weight.double().T).reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)

    q, k, v = project(attention.q_proj), project(attention.k_proj), project(attention.v_proj)
    joined = reference([q, k, v], mask, causal)[0].permute(0, 2, 1, 3).reshape(x.shape)
    output: Tensor = joined @ attention.o_proj.weight.double().T + attention.o_proj.bias.double()
    return output


def call(attention: Any, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """What the module gives for x, if it is a tensor."""
    options: dict[str, Any] = {} if mask is None else {"mask": mask}
    return is_tensor(attention(x, **options, causal=True) if causal else attention(x, **options), "forward")


# Sizes of the checks of cost are such that blocks, not Q, K and V, are the largest tensors.
SLIM, WIDE = 3, 16  # features and block size of checks of cost, in one head
EXACT = 2e-5  # float32 against float64
ABOUT = 1e-2  # where costs are counted


def wide(
    subject: Subject, rng: torch.Generator, n: int, m: int, block: int = WIDE, width: int = SLIM
) -> tuple[Any, list[Tensor]]:
    """A float32 module of one head, and Q, K, V of batch 1."""
    seed(1)
    given = [torch.randn(1, 1, length, width, generator=rng) for length in (n, m, m)]
    return subject.FlashAttention(width, 1, block), given


PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "mv", "addmv", "dot")


class _Calls(TorchFunctionMode):
    """How many operations are called, and how many elements each kind gives: above autograd, a third of the cost of a
    Trace.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, Tensor):
            self.operations += 1
            self.of[func.__name__] += result.numel()
        return result


class _Elements(DispatchMode):
    """A Trace that is lighter: the elements of the largest storage made, and which products were of half precision.

    Args:
        given: tensors that are there before; their storages do not count.
    """

    def __init__(self, given: Iterable[Tensor | None] = ()) -> None:
        super().__init__()
        self.half_products: set[str] = set()
        self.largest = 0
        self._given = {x.untyped_storage().data_ptr() for x in given if x is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **kwargs) if kwargs else func(*args), func.overloadpacket.__name__
        for tensor in result if type(result) in (tuple, list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() > self.largest * tensor.element_size() and storage.data_ptr() not in self._given:
                    self.largest = storage.nbytes() // tensor.element_size()
        if name in PRODUCTS and any(isinstance(x, Tensor) and x.dtype in HALVES for x in args):
            self.half_products.add(name)
        return result
