"""A walk over models that are adapted (5.1 to 5.4, 5.7, 5.8): trees, names, targets, and what stands beside them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.testing import Aspect, Close, Step, Subject, Walk, walk_check

from .reference import IN, OUT, descend, linear, randomize, trainable, tree, value

ALPHA = 5.0
CLOSE = Close(1e-5)
# Layers that are never adapted, by what they are called.
BESIDE = {
    "": ("head",),
    "beside layers named like adapters": ("head", "flora", "lora_head", "a.lora_A", "a.lora_down", "my_lora_B.up"),
    "beside nearly the same names": ("head", "a.my_q_proj", "a.q_proj_2", "q.proj", "a.q_projs.0", "a.Q_proj"),
}


class Reads(nn.Module):
    """Reads the weight and the bias of its layer in place of calling it, as nn.MultiheadAttention does."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.q_proj = layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.q_proj.weight, self.q_proj.bias)


@dataclass
class Model:
    """A model of the check's own, and what is to be adapted in it."""

    root: nn.ModuleDict
    paths: list[str]
    layers: list[nn.Linear]

    @property
    def adapters(self) -> list[Any]:
        """What stands in the layers' places."""
        return [self.root.get_submodule(path) for path in self.paths]


class Models(Walk):
    """Models that are built, adapted, trained, counted, saved and loaded."""

    aspects = (
        Aspect("trains", "5.3", {"": False, "with a look at what is trained": True}),
        Aspect("counts", "5.4", {"": False, "counted": True}),
        Aspect("saves", "5.8", {"": "", "saved and loaded": "saved", "saved while merged": "merged"}),
        Aspect(
            "mode",
            "5.7",
            {
                "": lambda layer: layer,
                "a layer in eval": lambda layer: layer.eval(),
                "a layer in bfloat16": lambda layer: layer.bfloat16(),
                "a layer in float64": lambda layer: layer.double(),
            },
            rate=0.3,
        ),
        Aspect("frozen", "5.3", {"": False, "of a frozen model": True}, rate=0.3),
        Aspect("rank", "5.1", {"": 2, "rank 1": 1, "rank 17": 17}, rate=0.3),
        Aspect("reads", "5.2", {"": False, "whose parent reads weight and bias": True}, rate=0.2),
        Aspect(
            "places",
            "5.2",
            {
                "": ("a.q_proj",),
                "at the top": ("q_proj",),
                "three deep": ("a.b.c.q_proj",),
                "in a few blocks": ("blocks.0.q_proj", "blocks.1.q_proj", "a.q_proj"),
                "two in one parent": ("a.q_proj", "a.v_proj"),
            },
        ),
        Aspect("shared", "5.2", {"": "", "a layer under two names": "layer", "a block used twice": "block"}, rate=0.3),
        Aspect("tied", "5.2", {"": False, "sharing its weight with an embedding": True}, rate=0.3),
        Aspect("targets", "5.2", {"": "", "by the whole path": "path", "by both, one idle": "both"}),
        Aspect("beside", "5.2", BESIDE),
    )
    otherwise = "5.2"

    def begin(self, subject: Subject) -> Subject:
        """Every step has a model of its own."""
        return subject

    def step(self, state: Subject, step: Step) -> None:
        """One model."""
        model = built(step)
        if not adapted(state, model, step):
            return
        matches(model, step)
        if step["trains"]:
            trains(model)
        if step["counts"]:
            held = {id(parameter): parameter for parameter in model.root.parameters()}.values()
            asking = sum(parameter.numel() for parameter in held if parameter.requires_grad)
            wanted = sum(parameter.numel() for parameter in held), asking
            came = state.count_parameters(model.root)
            assert came == wanted, f"count_parameters(model): {came} came, {wanted} was wanted"
        if step["saves"]:
            saves(state, model, step)


def built(step: Step) -> Model:
    """The step's model; the same each time."""
    rng = step.rng()
    paths, layers = list(step["places"]), []
    for path in paths:
        layer = linear(rng, IN, OUT, bias="v_proj" not in path)
        layers.append(step["mode"](layer))
    found: dict[str, nn.Module] = {path: nn.Linear(3, 2) for path in step["beside"]}
    if step["tied"]:
        found["embedding"] = nn.Embedding(OUT, IN)
        found["embedding"].weight = layers[0].weight
    found |= {"norm": nn.LayerNorm(4), "o.q_proj": nn.Embedding(3, 2)}
    if step["reads"]:
        found[paths[0].removesuffix("q_proj") + "reads"] = Reads(layers[0])
        paths[0] = paths[0].removesuffix("q_proj") + "reads.q_proj"
    found |= {path: layer for path, layer in zip(paths, layers, strict=True) if path.split(".")[-2:-1] != ["reads"]}
    if step["shared"] == "layer":
        found["again.v_proj"] = layers[0]
        paths.append("again.v_proj")
    if step["shared"] == "block":
        found["again"] = nn.ModuleDict({"q_proj": layers[0]})
        found["once.more"] = found["again"]
        paths += ["again.q_proj", "once.more.q_proj"]
    layers += [layers[0]] * (len(paths) - len(layers))
    root = tree(found)
    if step["frozen"]:
        root.requires_grad_(False)
    return Model(root, paths, layers)


def adapted(subject: Subject, model: Model, step: Step) -> bool:
    """Adapts the model; False if its bare weight is refused."""
    targets = ["q_proj", "v_proj"]
    if step["targets"] == "path":
        targets = list(model.paths)
    elif step["targets"] == "both":
        targets = ["idle", model.paths[0], "v_proj", "q_proj"]
    config = subject.LoRAConfig(rank=step["rank"], alpha=ALPHA, target_modules=targets, dropout=0.0)
    try:
        result = subject.apply_lora_to_model(model.root, config)
    except TypeError:
        if step["reads"]:
            return False
        raise
    assert result is model.root, "apply_lora_to_model: the model itself was wanted"
    return True


def parts(model: Model) -> list[Tensor]:
    """A and B of every adapter, once."""
    distinct = {id(layer): adapter for layer, adapter in zip(model.layers, model.adapters, strict=True)}
    return [part for adapter in distinct.values() for part in (adapter.lora_A, adapter.lora_B)]


def matches(model: Model, step: Step) -> None:
    """Each matched layer has one adapter in all of its places, which computes by the formula; no other one has any."""
    places = {id(adapter) for adapter in model.adapters}
    for path, adapter, layer in zip(model.paths, model.adapters, model.layers, strict=True):
        what = f"apply_lora_to_model: the layer at {path!r}"
        assert hasattr(adapter, "lora_A"), f"{what} is not adapted"
        assert adapter.original_layer is layer, f"{what}: its adapter's original_layer is another; adapted twice?"
        other = model.adapters[model.layers.index(layer)]
        assert adapter is other, f"{what} is registered under several names; another adapter stands in each"
        assert adapter.training is layer.training, f"{what}: the adapter's training flag is {adapter.training}"
    more = [
        name
        for name, module in model.root.named_modules()
        if id(module) not in places
        and not isinstance(module, nn.ModuleDict)
        and isinstance(getattr(module, "lora_A", None), Tensor)
        and hasattr(module, "original_layer")
    ]
    assert not more, f"apply_lora_to_model: {more} are adapted too"
    rng = step.rng()
    randomize(rng, *parts(model))
    for path, adapter, layer in zip(model.paths, model.adapters, model.layers, strict=True):
        dtype = layer.weight.dtype
        x = torch.randn(3, IN, generator=rng, dtype=torch.float64).to(dtype)
        merged = layer.weight.double() + ALPHA / step["rank"] * adapter.lora_B.double() @ adapter.lora_A.double()
        wanted = F.linear(x.double(), merged, None if layer.bias is None else layer.bias.double()).detach()
        what = f"the layer at {path!r}, adapted"
        limit = 6e-2 if dtype == torch.bfloat16 else 1e-5
        assert adapter.lora_A.dtype == dtype, f"{what}: lora_A in {adapter.lora_A.dtype} came, {dtype} was wanted"
        CLOSE(adapter(x).detach().double(), wanted, what, tolerance=limit)
        if path.endswith("reads.q_proj"):
            for _ in range(2):
                reads(model, path, x, wanted, limit)


def reads(model: Model, path: str, x: Tensor, wanted: Tensor, limit: float) -> None:
    """A module that reads its layer's weight gives the formula's output, or a TypeError each time."""
    try:
        came = model.root.get_submodule(path.removesuffix(".q_proj"))(x)
    except TypeError:
        return
    except AttributeError as error:
        raise AssertionError(
            f"a module that reads {path}.weight and bias: AttributeError ({error}) came\n"
            "give what a parent reads, with gradients, or raise TypeError that says that it cannot be read"
        ) from error
    what = f"a module that reads the weight of its adapted layer at {path!r}"
    CLOSE(came.detach().double(), wanted, what, tolerance=limit)


def trains(model: Model) -> None:
    """A and B alone ask for gradients, and a step moves nothing else."""
    wanted = {part.data_ptr() for part in parts(model)}
    names = {held.data_ptr(): name for name, held in model.root.named_parameters()}
    asking = {parameter.data_ptr() for parameter in trainable(model.root)}
    assert not asking - wanted, (
        f"apply_lora_to_model: trainable besides lora_A and lora_B: {sorted(names[more] for more in asking - wanted)}"
    )
    assert asking == wanted, f"apply_lora_to_model: {len(wanted - asking)} matrices A and B are not trainable"
    starts = [value(layer.weight) for layer in model.layers]
    outputs = [
        adapter(torch.ones(2, IN, dtype=layer.weight.dtype)).double().square().mean()
        for adapter, layer in zip(model.adapters, model.layers, strict=True)
    ]
    descend(list(model.root.parameters()), 1e-3 * torch.stack(outputs).sum())
    for path, layer, start in zip(model.paths, model.layers, starts, strict=True):
        assert torch.equal(layer.weight, start), f"{path}.original_layer.weight has changed after a step"


def saves(subject: Subject, model: Model, step: Step) -> None:
    """What is saved holds the adapters alone, and brings them back in a model of the same base."""
    if step["saves"] == "merged":
        for adapter in model.adapters:
            adapter.merge_weights()
    saved = subject.lora_state_dict(model.root)
    other = built(step)
    adapted(subject, other, step)
    count = sum(
        held.numel() for held in {(held.shape, *held.flatten()[:2].tolist()): held for held in saved.values()}.values()
    )
    wanted = sum(part.numel() for part in parts(model))
    assert count == wanted, f"lora_state_dict(model): {count} numbers came, the adapters hold {wanted}"
    unexpected = other.root.load_state_dict(saved, strict=False).unexpected_keys
    assert not unexpected, f"load_state_dict(lora_state_dict(model), strict=False): unexpected keys {unexpected}"
    for came, part in zip(parts(other), parts(model), strict=True):
        assert torch.equal(came, part), "lora_A or lora_B after loading: not what was saved"


test_models_in_any_order = walk_check(Models(), 12)
