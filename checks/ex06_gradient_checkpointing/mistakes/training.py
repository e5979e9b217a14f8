"""Wrong answers to ex06 that train in another way, or hold too much while they do (6.6)."""

from harness.model.bank import Mistake

ZERO_GRAD = "    optimizer.zero_grad()\n"
LOGITS = '    logits = model(batch["input_ids"])  # [B, L, V]\n'
BACKWARD = "    loss.backward()\n"
UPDATE = "    optimizer.step()\n"
LOSS = "loss.item()"
DETACHED = "def _detached("
FLAT = 'logits.flatten(0, 1), batch["targets"].flatten()'

MISTAKES = [
    Mistake("gradients_not_zeroed", "6.6", "zero_grad", (ZERO_GRAD, ""), only=True),
    Mistake(
        "gradients_zeroed_after_backward",
        "6.6",
        "afterwards",
        (ZERO_GRAD, ""),
        (BACKWARD, BACKWARD + ZERO_GRAD),
        only=True,
    ),
    Mistake(
        "gradients_zeroed_after_the_step",
        "6.6",
        "zero_grad",
        (ZERO_GRAD, ""),
        (UPDATE, UPDATE + ZERO_GRAD),
        only=True,
    ),
    Mistake(
        "frozen_weights_not_cleared",
        "6.6",
        "embedding is frozen",
        (
            ZERO_GRAD,
            """    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = None
""",
        ),
        only=True,
    ),
    Mistake(
        "first_group_cleared",
        "6.6",
        "zero_grad before",
        (ZERO_GRAD, '    for parameter in optimizer.param_groups[0]["params"]:\n        parameter.grad = None\n'),
        only=True,
    ),
    Mistake("no_step", "6.6", "afterwards", (UPDATE, ""), only=True),
    Mistake(
        "step_by_hand",
        "6.6",
        "weight decay",
        (
            UPDATE,
            """    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= optimizer.param_groups[0]['lr'] * parameter.grad
""",
        ),
        only=True,
    ),
    Mistake(
        "model_called_twice",
        "6.6",
        "the model is called 2 times",
        (LOGITS, '    model(batch["input_ids"])\n' + LOGITS),
        wasteful=True,
    ),
    Mistake(
        "step_before_backward",
        "6.6",
        "afterwards",
        (BACKWARD + UPDATE, UPDATE + BACKWARD),
        only=True,
    ),
    Mistake("two_steps", "6.6", "once each", (UPDATE, UPDATE + UPDATE), only=True),
    Mistake(
        "loss_after_the_step",
        "6.6",
        "before the step",
        (
            "    return loss.item()\n",
            """    logits = model(batch["input_ids"])
    return criterion(logits.flatten(0, 1), batch["targets"].flatten()).item()
""",
        ),
        only=True,
    ),
    Mistake("loss_is_a_tensor", "6.6", "Tensor came", (LOSS, "loss.detach()"), only=True),
    Mistake("loss_summed", "6.6", "the loss", (LOSS, 'loss.item() * batch["targets"].numel()'), only=True),
    Mistake(
        "positions_in_another_order",
        "6.6",
        "another order",
        (FLAT, 'logits.transpose(0, 1).flatten(0, 1), batch["targets"].T.flatten()'),
        only=True,
    ),
    Mistake("classes_second", "6.6", "shapes", (FLAT, 'logits.transpose(1, 2), batch["targets"]'), only=True),
    Mistake(
        "next_token_targets",
        "6.6",
        "the loss",
        (FLAT, 'logits[:, :-1].flatten(0, 1), batch["targets"][:, 1:].flatten()'),
        only=True,
    ),
    Mistake(
        "targets_from_the_inputs",
        "6.6",
        "the loss",
        ('batch["targets"].flatten()', 'batch["input_ids"].flatten()'),
        only=True,
    ),
    Mistake("targets_viewed", "6.6", "raises", ('batch["targets"].flatten()', 'batch["targets"].view(-1)'), only=True),
    Mistake("logits_viewed", "6.6", "raises", ("logits.flatten(0, 1)", "logits.view(-1, logits.size(-1))"), only=True),
    Mistake(
        "gradients_clipped",
        "6.6",
        "afterwards",
        (UPDATE, "    nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n" + UPDATE),
        only=True,
    ),
    Mistake(
        "train_step_in_eval",
        "6.6",
        "alive at once",
        (ZERO_GRAD, "    model.eval()\n" + ZERO_GRAD),
        only=True,
    ),
    Mistake(
        "recomputed_activations_pile_up",
        "6.6",
        "pile up",
        ("saved.append(tensor.detach())", "(saved.append(tensor.detach()), _PILE.append(tensor.detach()))"),
        (DETACHED, "_PILE: list[Tensor] = []\n\n\n" + DETACHED),
    ),
    Mistake(
        "inputs_pile_up_over_the_steps",
        "6.6",
        "pile up",
        ("        self.function = function\n", "        self.function = function\n        _PILE.append(self)\n"),
        (DETACHED, "_PILE: list[Any] = []\n\n\n" + DETACHED),
    ),
]
