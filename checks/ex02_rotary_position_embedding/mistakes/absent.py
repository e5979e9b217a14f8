"""Wrong answers that do nothing at all: zeros, nothing, or what came."""

from harness.model.bank import Mistake

TURN = "        return self.apply_rotary_pos_emb(x, self._cos[positions], self._sin[positions])\n"
OUT = "        return self.o_proj(context.transpose(1, 2).flatten(start_dim=2))  # [B, L, D]\n"

MISTAKES = [
    Mistake("zeros", ("2.1", "2.2", "2.3", "2.6", "2.7"), "position 0", (TURN, "        return torch.zeros_like(x)\n")),
    Mistake("none", "2.1", "None came", (TURN, TURN.replace("return ", ""))),
    Mistake("attention_gives_x", "2.4", "attention(x)", (OUT, "        return x\n")),
    Mistake("identity", ("2.1", "2.2", "2.3", "2.6", "2.7"), "no turn", (TURN, "        return x\n")),
]
