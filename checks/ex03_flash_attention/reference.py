"""What the checks of ex03 share: sizes, builders, attention from the formula, and probes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from harness.testing import Close, DispatchMode, Hang, Subject, is_tensor, seed

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
    scores = hidden_scores(q, k, mask, causal)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.clamp(min=0.5) @ v, (top + total.log()).squeeze(-1)  # 0.5: of a row that sees nothing


def hidden_scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The scores, -inf where mask or causal hide them."""
    scores = q @ k.mT / q.size(-1) ** 0.5
    allowed = None if mask is None else mask != 0
    if causal:
        below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.size(2) - q.size(2))
        allowed = below if allowed is None else allowed & below
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -INF)
    return scores


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
    output, logsumexp = (x.detach() for x in reference(given, mask=mask, causal=causal))

    with unwritten(given):
        actual = attend(attention, given, mask, causal)

        dtype = given[0].dtype
        if actual[0].shape == output.shape and actual[0].dtype != dtype:
            hint = f"the output has Q's dtype{'; float64 is computed in float64' if dtype == torch.float64 else ''}"
        with explained(lambda: known_output(actual[0], output, attention.block_size, given, mask, causal)):
            close(actual[0], output.to(dtype), f"{CALL}: output", hint=hint, tolerance=tolerance)
        assert actual[1].dtype in (torch.float32, torch.float64), (
            f"{CALL}: logsumexp has {actual[1].dtype}, float32 or better was wanted"
        )
        close(actual[1].double(), logsumexp, f"{CALL}: logsumexp", hint=hint, tolerance=tolerance)
    return actual


# What a message says besides: computed when a check has failed, and not before.


@contextmanager
def unwritten(given: Iterable[Tensor]) -> Iterator[None]:
    """What fails inside is told as a write to Q, K or V, if there was one."""
    kept = [(name, x, x._version) for name, x in zip("QKV", given, strict=False)]
    try:
        yield
    except Hang:
        raise
    except AssertionError as error:
        names = [name for name, x, version in kept if x._version != version]
        if names:
            verb = "is" if len(names) == 1 else "are"
            raise AssertionError(
                f"{CALL}: {' and '.join(names)} {verb} written to, unchanged inputs were wanted"
            ) from error
        raise


@contextmanager
def explained(find: Callable[[], str], otherwise: str = "") -> Iterator[None]:
    """What fails inside is told with what `find` finds then, or else `otherwise`, on a line of its own."""
    try:
        yield
    except Hang:
        raise
    except AssertionError as error:
        if found := quietly(find) or otherwise:
            raise AssertionError(f"{error}\n{found}") from error
        raise


def quietly(find: Callable[[], str]) -> str:
    """What `find` gives; nothing, if it fails: it may call the code that has failed already."""
    try:
        return find()
    except Hang:
        raise
    except Exception:
        return ""


def same(came: Tensor | None, form: Tensor, wanted: Tensor) -> bool:
    """Whether what came is a wrong form, which is not what was wanted."""
    if came is None or came.shape != wanted.shape or form.shape != wanted.shape:
        return False
    near = torch.allclose(came.detach().double(), form.double(), 1e-4, 1e-4)
    return near and not torch.allclose(form.double(), wanted.double(), 1e-3, 1e-3)


def known_output(
    came: Tensor, wanted: Tensor, block_size: int, given: list[Tensor], mask: Tensor | None, causal: bool
) -> str:
    """Which slip gives just this output, if a known one does."""
    q, k, v = (x.detach() for x in given)
    n, m = q.size(2), k.size(2)
    forms: dict[str, tuple[list[Tensor], Tensor | None, bool]] = {}
    if mask is not None:
        forms["what comes without the mask"] = [q, k, v], None, causal
        forms["what comes with the mask inverted"] = [q, k, v], mask == 0, causal
    if causal:
        forms["what comes with causal = False"] = [q, k, v], mask, False
    if causal and n != m:
        forms["what comes with j <= i in place of j <= i + M - N"] = [q, k, v], first_keys(n, m, mask), False
    forms["what comes of Q Kᵀ, not divided by √Dh"] = [q * q.size(-1) ** 0.5, k, v], mask, causal
    if mask is None and not causal and m <= 32:
        for kept in range(1, m):
            forms[f"what the first {kept} of {m} keys give alone"] = [q, k[:, :, :kept], v[:, :, :kept]], None, False
        padded = [functional.pad(x, (0, 0, 0, -m % block_size)) for x in (k, v)]
        forms[f"what keys padded to {padded[0].size(2)} with zeros give; padding has no weight"] = (
            [q, *padded],
            None,
            False,
        )
    for words, (form, hides, diagonal) in forms.items():
        if same(came, reference(form, hides, diagonal)[0], wanted):
            return f"this is {words}"
    return ""


def first_keys(n: int, m: int, mask: Tensor | None) -> Tensor:
    """A mask that hides the keys j > i, and what another one hides."""
    allowed = torch.ones(n, m, dtype=torch.bool).tril()
    return allowed if mask is None else allowed & (mask != 0)


def known_gradient(
    name: str,
    came: Tensor | None,
    wanted: Tensor,
    given: list[Tensor],
    probe: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> str:
    """Which option a backward leaves out that gives just this gradient of Q, K or V, if one does."""
    q, k, v = (x.detach().double() for x in given)
    output, logsumexp = reference([q, k, v], mask, causal)
    for words, hides, diagonal in (("without the mask", None, causal), ("with causal = False", mask, False)):
        weights = (hidden_scores(q, k, hides, diagonal) - logsumexp[..., None]).exp()
        scores = weights * (probe @ v.mT - (probe * output).sum(-1, keepdim=True)) / q.size(-1) ** 0.5
        form = {"Q": scores @ k, "K": scores.mT @ q, "V": weights.mT @ probe}[name]
        if same(came, form, wanted):
            return f"this is what backward gives {words}"
    return ""


def known_forward(attention: Any, x: Tensor, mask: Tensor | None, causal: bool, came: Tensor, wanted: Tensor) -> str:
    """Which slip of the layer gives just this, if a known one does."""

    def split(linear: nn.Linear, transposed: bool = True) -> Tensor:
        projected = x @ linear.weight.T
        return projected.view(B, -1, H, DH).transpose(1, 2) if transposed else projected.view(B, H, -1, DH)

    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    unsplit, _ = reference([split(linear, transposed=False) for linear in layers], mask, causal)
    output, _ = reference(map(split, layers), mask, causal)
    joined, project = output.transpose(1, 2).reshape(x.shape), attention.o_proj
    forms = {
        "without the transpose after the split into heads": project(unsplit.transpose(1, 2).reshape(x.shape)),
        "without the transpose before the join of the heads": project(output.reshape(x.shape)),
        "without either transpose, after the split and before the join": project(unsplit.reshape(x.shape)),
        "without o_proj": joined,
        "without o_proj's bias": joined @ project.weight.T,
        "without the mask": standard(attention, x, None, causal),
        "with causal = False": standard(attention, x, mask, False),
    }
    for words, form in forms.items():
        if same(came, form, wanted):
            return f"this is what comes {words}"
    return ""


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
        elif func is Tensor.__setitem__:
            self.operations += 1
        return result


class _Elements(DispatchMode):
    """A Trace that is lighter: the elements of the largest storage made, and the tensor that it was made for in words,
    and which products were of half precision.

    Args:
        given: tensors that are there before; their storages do not count.
    """

    def __init__(self, given: Iterable[Tensor | None] = ()) -> None:
        super().__init__()
        self.half_products: set[str] = set()
        self.largest, self._made = 0, (torch.Size(), torch.float32)
        self._given = {x.untyped_storage().data_ptr() for x in given if x is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **kwargs) if kwargs else func(*args), func.overloadpacket.__name__
        for tensor in result if type(result) in (tuple, list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() > self.largest * tensor.element_size() and storage.data_ptr() not in self._given:
                    self.largest = storage.nbytes() // tensor.element_size()
                    self._made = tensor.shape, tensor.dtype
        if name in PRODUCTS and any(isinstance(x, Tensor) and x.dtype in HALVES for x in args):
            self.half_products.add(name)
        return result

    def __str__(self) -> str:
        return f"a tensor {[*self._made[0]]} of {self._made[1]} came, {self.largest} elements"
