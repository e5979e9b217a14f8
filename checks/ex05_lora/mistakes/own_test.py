"""Own tests that say too little or too much (5.9)."""

from harness.model.bank import Mistake

OWN_TEST = "    torch.manual_seed(0)\n    x = torch.randn(5, 7)\n"

MISTAKES = [
    Mistake(
        "own_test_asserts_nothing",
        "5.9",
        "passes although the code under it is wrong",
        (OWN_TEST, "    return\n" + OWN_TEST),
        only=True,
    ),
    Mistake(
        "own_test_only_runs",
        "5.9",
        "passes although",
        (
            OWN_TEST,
            """    LoRALinear(nn.Linear(7, 3), rank=2)(torch.randn(5, 7)).sum().backward()
    return
"""
            + OWN_TEST,
        ),
        only=True,
    ),
    Mistake(
        "own_test_is_wrong",
        "5.9",
        "fails on right code",
        (
            "    expected = (original + x @ layer.lora_A.mT @ layer.lora_B.mT * 6.0 / 2).detach()\n",
            "    expected = (original + x @ layer.lora_A.mT @ layer.lora_B.mT * 6.0).detach()\n",
        ),
        only=True,
    ),
    Mistake(
        "own_test_leans_on_names",
        "5.9",
        "fails on right code",
        (
            '    assert layer.lora_A.any(), "A starts at zero"\n',
            '    assert "lora_A" in dict(layer.named_parameters()), "no lora_A"\n',
        ),
        only=True,
    ),
]
