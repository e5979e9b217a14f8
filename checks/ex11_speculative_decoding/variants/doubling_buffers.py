"""Keys and values lie in buffers that grow by doubling, twice as wide as a head; rewind only moves the end."""

from collections.abc import Sequence

import torch
from torch import Tensor


class CachedModel:
    def __init__(self, model: Decoder) -> None:
        self._model = model
        self.length = 0
        self._buffers: list[Tensor] = []  # of each layer [room, 2, Hkv, Dh]

    def feed(self, tokens: Sequence[int]) -> Tensor:
        start, end = self.length, self.length + len(tokens)
        device = next(self._model.parameters()).device

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer == len(self._buffers):
                self._buffers.append(k.new_empty(1, 2, *k.shape[1:]))
            buffer = self._buffers[layer]
            while len(buffer) < end:
                buffer = torch.cat([buffer, torch.empty_like(buffer)])
            self._buffers[layer] = buffer
            buffer[start:end, 0], buffer[start:end, 1] = k, v
            return causal_attention(q, buffer[:end, 0], buffer[:end, 1])

        with torch.no_grad():
            fed = torch.tensor(tokens, dtype=torch.int64).to(device)
            logits: Tensor = self._model(fed, torch.arange(start, end).to(device), attend)
        self.length = end
        return logits

    def rewind(self, length: int) -> None:
        if length < 0 or length > self.length:
            raise ValueError(f"rewind to {length} of {self.length}")
        self.length = length
