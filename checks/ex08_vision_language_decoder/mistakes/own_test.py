"""Own tests that say too little or too much (8.10)."""

from harness.model.bank import Mistake

OWN_TEST = "    torch.manual_seed(0)\n    _patches_have_positions()\n"
STAGES = "    _stages_train_their_parts()\n\n"

MISTAKES = [
    Mistake(
        "own_test_asserts_nothing",
        "8.10",
        "passes although the code under it is wrong",
        (OWN_TEST, "    return\n" + OWN_TEST),
        only=True,
    ),
    Mistake(
        "own_test_only_runs",
        "8.10",
        "passes although",
        (
            OWN_TEST,
            """    lone = VisionLanguageModel(nn.Flatten(2), _Placed(13), 4, image_token_id=-200)
    lone.generate(torch.tensor([[1, -200]]), torch.randn(1, 2, 2, 2), max_new_tokens=2)
    return
"""
            + OWN_TEST,
        ),
        only=True,
    ),
    Mistake("own_test_without_stages", "8.10", "stage", (STAGES, "\n"), only=True),
    Mistake(
        "own_test_is_wrong",
        "8.10",
        "fails on right code",
        ("[7, 8, -100, -100, 9, 6, 4]]", "[7, 8, -100, 9, 9, 6, 4]]"),
        only=True,
    ),
    Mistake(
        "own_test_leans_on_attributes",
        "8.10",
        "fails on right code",
        (OWN_TEST, '    assert hasattr(PatchEmbedding(4, 2, 3), "grid"), "no grid"\n' + OWN_TEST),
        only=True,
    ),
]
