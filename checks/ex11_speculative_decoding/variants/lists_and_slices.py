"""The cache is a list of every token's keys and values, by layer; feed runs in inference_mode."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class CachedModel:
    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(model.num_layers)]

    @property
    def length(self) -> int:
        return len(self.kept[0])

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        start, added = self.length, [list[tuple[Tensor, Tensor]]() for _ in self.kept]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            added[layer] = [(key.clone(), value.clone()) for key, value in zip(k, v, strict=True)]
            both = self.kept[layer] + added[layer]
            keys, values = (torch.stack([pair[i] for pair in both], dim=1)[None] for i in (0, 1))  # [1, Hkv, S, Dh]
            place = torch.arange(len(both), device=q.device)
            seen = place <= place[start:, None]  # [T, S]
            attended = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], keys, values, attn_mask=seen, enable_gqa=True
            )
            return attended[0].transpose(0, 1)

        fed = torch.as_tensor(list(tokens), device=next(self.model.parameters()).device)
        positions = torch.tensor(range(start, start + len(tokens)), device=fed.device)
        logits: Tensor = self.model(fed, positions, attend)
        self.kept = [old + new for old, new in zip(self.kept, added, strict=True)]
        return logits

    def rewind(self, length: int) -> None:
        if length not in range(self.length + 1):
            raise ValueError(f"{self.length} tokens are there, which cannot become {length}")
        self.kept = [pairs[:length] for pairs in self.kept]
