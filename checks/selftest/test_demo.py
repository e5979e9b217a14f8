"""`make demo`: checkpoints are read as transformers reads them, refused in one line, and written with for real."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devtools.workspace import Workspace
from harness.model.exercise import exercises
from harness.model.paths import TOP

HAVING = [exercise for exercise in exercises().values() if exercise.demo_file.exists()]

# In processes of their own: this one must stay fit for forking.
MAKE = """
import sys
from pathlib import Path
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

for name, sizes in {"plain": {}, "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4}}.items():
    torch.manual_seed(len(name))
    config = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 8}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "initializer_range": 0.5}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "eos_token_id": [3, 4]}
    folder = Path(sys.argv[1], name)
    LlamaForCausalLM(LlamaConfig(**config | sizes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
"""
COMPARE = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaForCausalLM
from harness.language.checkpoint import checkpoint
from harness.model.exercise import exercises
from harness.testing.subject import execute

given = execute(exercises()["ex09"].starter, Path("starter.py"), "given")
found = {}
for name in ("plain", "tied"):
    language = checkpoint(Path(sys.argv[1], name), given.Decoder)
    tokens = torch.randint(40, (11,), generator=torch.Generator().manual_seed(0))
    attend = lambda layer, q, k, v: given.causal_attention(q, k, v)
    ours = language.model(tokens, torch.arange(11), attend)
    theirs = LlamaForCausalLM.from_pretrained(Path(sys.argv[1], name))(tokens[None]).logits[0]
    written = given.generate_alone(language.model, language.encode("w7 w1 w30"), 6, language.eos_token_id)
    found[name] = [float((ours - theirs).abs().max() / theirs.abs().max()), language.eos_token_id,
                   language.encode("w7 w1"), language.decode(written)]
print(json.dumps(found))
"""
REFUSE = """
import json, sys
from pathlib import Path
from harness.language.checkpoint import checkpoint
from harness.model.exercise import UsageError, exercises
from harness.testing.subject import execute

given = execute(exercises()["ex09"].starter, Path("starter.py"), "given")
file, said = Path(sys.argv[1], "config.json"), []
config = json.loads(file.read_text())
for change in json.loads(sys.argv[2]):
    file.write_text(json.dumps(config | change))
    try:
        checkpoint(file.parent, given.Decoder)
        said.append("accepted")
    except UsageError as error:
        said.append(str(error))
print(json.dumps(said))
"""
TOY = """
import sys
from pathlib import Path
from harness.language import characters
from harness.model.exercise import exercises
from harness.report import terminal
from harness.testing.subject import execute

characters.BUILD = Path(sys.argv[1])
characters._SECONDS = {"model": 2.0, "draft": 1.0}
given = execute(exercises()["ex09"].starter, Path("starter.py"), "given")
for time in range(2):
    toy = characters.characters(given.Decoder, "text", terminal.console())
print(repr(toy.decode(given.generate_alone(toy.model, toy.encode("The é"), 20))))
"""


def python(program: str, *arguments: object) -> str:
    """What a program of its own prints."""
    environment = {**os.environ, "PYTHONPATH": str(TOP / "checks"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=TOP, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    python(MAKE, folder)
    return folder


def test_the_copies_of_the_given_decoder_are_equal() -> None:
    def given(ex: str) -> dict[str, str]:
        kinds = (ast.ClassDef, ast.FunctionDef)
        body = ast.parse(exercises()[ex].starter).body
        return {node.name: ast.unparse(node) for node in body if isinstance(node, kinds)}

    one, other = given("ex09"), given("ex11")

    names = ("Decoder", "DecoderLayer", "rotate", "causal_attention", "generate_alone")
    assert [one[name] for name in names] == [other[name] for name in names]


def test_a_checkpoint_is_read_as_transformers_reads_it(checkpoints: Path) -> None:
    found = json.loads(python(COMPARE, checkpoints).splitlines()[-1])

    for difference, eos, encoded, written in found.values():
        assert difference < 1e-5 and eos == 3 and encoded == [7, 1], found
        assert written and all(word.startswith("w") for word in written.split()), found


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling is {'type': 'linear'}; the Decoder can hold None alone"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'; the Decoder can hold 'default'"),
    ({"attention_bias": True}, "attention_bias is True; the Decoder can hold False alone"),
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; the Decoder can hold 'llama' alone"),
    ({"hidden_size": None}, "hidden_size is None; a number is wanted"),
    ({"intermediate_size": 32}, "for the Decoder's layers.0.gate_proj.weight: (40, 24) came, (32, 24) was wanted"),
    ({"num_hidden_layers": 4}, "for the Decoder's layers.3.attention_norm.weight: nothing came, (24,) was wanted"),
]


def test_what_the_decoder_cannot_hold_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "plain", tmp_path / "checkpoint")

    said = json.loads(python(REFUSE, tmp_path / "checkpoint", json.dumps([change for change, _ in REFUSED])))

    for message, (_, says) in zip(said, REFUSED, strict=True):
        assert says in message and "\n" not in message, said


@pytest.mark.parametrize("exercise", HAVING, ids=lambda exercise: exercise.id)
def test_the_answer_writes(workspace: Workspace, checkpoints: Path, exercise: Any) -> None:
    options = ("SUBMISSION=answers", f"MODEL={checkpoints / 'plain'}", "PROMPT=w1 w2 it's w3")

    done = workspace.make("demo", f"EX={exercise.number}", *options)

    assert done.returncode == 0, done.stdout
    assert "plain, 0.0 M parameters; the draft is the first half of its layers" in done.stdout, done.stdout
    assert "answers: done" in done.stdout and "the same text" in done.stdout and "times" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo",), "make demo wants one exercise, as in: make demo EX=1"),
        (("demo", "EX=1"), "ex01 has no demo; these have: EX="),
        (("demo", "EX=9", "MODEL=nowhere"), "MODEL=nowhere: no such folder; one with a Llama-format checkpoint"),
        (("demo", "EX=9", "MODEL=answers"), "answers: holds no config.json; config.json, *.safetensors and"),
    ],
)
def test_what_cannot_be_done_is_one_line(workspace: Workspace, arguments: tuple[str, ...], says: str) -> None:
    done = workspace.make(*arguments)

    lines = [line for line in done.stdout.splitlines() if not line.startswith("make: ***")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done.stdout


def test_code_that_is_not_written_is_named(workspace: Workspace, checkpoints: Path) -> None:
    done = workspace.make("demo", "EX=9", f"MODEL={checkpoints / 'tied'}")

    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    assert "NotImplementedError" in done.stdout and "make watch EX=9 says what is open" in done.stdout, done.stdout


def test_the_toy_is_trained_once_and_kept(tmp_path: Path) -> None:
    said = python(TOY, tmp_path)

    assert said.count("training a toy for the demos, once") == 1 and said.count("nats per character") == 2, said
    assert len(list((tmp_path / "demo").iterdir())) == 1
