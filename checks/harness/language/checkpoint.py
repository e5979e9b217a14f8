"""Reads a Llama-format checkpoint (config.json, *.safetensors, tokenizer.json) into a Decoder of an exercise."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.language.model import Language, size
from harness.model.exercise import UsageError

# What must have this value, where the configuration names it: a Decoder has nothing else.
_WANTED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
}
_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    **{f"self_attn.{name}": name for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{name}": name for name in ("gate_proj", "up_proj", "down_proj")},
}
_PROMPTS = ("Once upon a time", "The little dog", "In the morning,", "She opened the door and")


def checkpoint(folder: Path, decoder: Any, draft: Path | None = None) -> Language:
    """The language model in a folder.

    Args:
        decoder: the class Decoder.
        draft: the folder of a smaller model with the same tokens; by default the draft is the first half of the layers.

    Raises:
        UsageError: a file is missing, or the Decoder cannot hold the model; the message names the file or the key.
    """
    config = _config(folder)
    model = _decoder(folder, config, decoder)
    if draft is None:
        smaller = _decoder(folder, {**config, "num_hidden_layers": max(1, config["num_hidden_layers"] // 2)}, decoder)
        drafted = "the draft is the first half of its layers"
    else:
        smaller = _decoder(draft, _config(draft), decoder)
        drafted = f"the draft is {draft.name}, {size(smaller)}"
    if smaller.vocab_size != model.vocab_size:
        raise UsageError(f"DRAFT: {smaller.vocab_size} tokens, MODEL has {model.vocab_size}; they must be the same")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_there(folder, "tokenizer.json")))
    eos = config.get("eos_token_id")
    return Language(
        model,
        smaller,
        lambda text: tokenizer.encode(text).ids,
        lambda tokens: tokenizer.decode(list(tokens)),
        eos[0] if isinstance(eos, list) else eos,
        64,
        f"{folder.name}, {size(model)}; {drafted}",
        _PROMPTS,
    )


def _there(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise UsageError(f"{folder}: holds no {pattern}; config.json, *.safetensors and tokenizer.json are wanted")
    return found[0]


def _config(folder: Path) -> dict[str, Any]:
    """The configuration, with the base of the rotary frequencies under rope_theta.

    Raises:
        UsageError: it asks for what a Decoder cannot do.
    """
    path = _there(folder, "config.json")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    rope = config.get("rope_parameters") or {}  # Newer files keep base and scaling together.
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UsageError(f"{path}: rope_parameters.rope_type is {kind!r}; the Decoder can hold 'default' alone")
    config = {**rope, **config}
    for key, allowed in _WANTED.items():
        if key in config and config[key] not in allowed:
            raise UsageError(f"{path}: {key} is {config[key]!r}; the Decoder can hold {allowed[0]!r} alone")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for key in needed:
        if not isinstance(config.get(key), int):
            raise UsageError(f"{path}: {key} is {config.get(key)!r}; a number is wanted")
    return config


def _decoder(folder: Path, config: dict[str, Any], decoder: Any) -> Any:
    """A Decoder in float32 with a checkpoint's weights; layers beyond the configuration's are passed over."""
    from safetensors.torch import load_file

    heads = config["num_attention_heads"]
    layers, tied = config["num_hidden_layers"], config.get("tie_word_embeddings", False)
    model = decoder(
        config["vocab_size"],
        config["hidden_size"],
        layers,
        heads,
        config.get("num_key_value_heads") or heads,
        config.get("head_dim") or config["hidden_size"] // heads,
        config["intermediate_size"],
        config.get("rope_theta", 10000.0),
        config.get("rms_norm_eps", 1e-6),
        tied,
    )
    weights: dict[str, Tensor] = {}
    _there(folder, "*.safetensors")
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            ours = _ours(name, layers)
            if ours is None:
                raise UsageError(f"{path}: {name}: the Decoder has no such weight")
            if ours:
                weights[ours] = tensor.float()
    if tied:
        weights["head.weight"] = weights.get("embed.weight", torch.empty(0))
    for name, parameter in model.state_dict().items():
        came = tuple(weights[name].shape) if name in weights else "nothing"
        if came != tuple(parameter.shape):
            raise UsageError(f"{folder}: for the Decoder's {name}: {came} came, {tuple(parameter.shape)} was wanted")
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def _ours(name: str, layers: int) -> str | None:
    """The Decoder's name of a checkpoint's weight; empty for what needs none, None for what it does not know."""
    if name in _NAMES:
        return _NAMES[name]
    if name.endswith("rotary_emb.inv_freq"):
        return ""
    parts = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    if len(parts) < 2 or not parts[0].isdecimal() or parts[1] not in _LAYER_NAMES:
        return None
    return f"layers.{parts[0]}.{_LAYER_NAMES[parts[1]]}.weight" if int(parts[0]) < layers else ""
