"""ex05's answer agrees with the peft package, which many use for LoRA."""

import json
import os
import subprocess
import sys

from harness.model.paths import TOP

# In a process of its own: this one must stay fit for forking.
COMPARE = """
import json
from harness.commands.bench import bench_of
from harness.model.exercise import exercises
from harness.testing.subject import load

exercise = exercises()["ex05"]
print(json.dumps(bench_of(exercise).agreement(load(exercise.answer_file))))
"""


def test_outputs_gradients_and_merged_weights_are_those_of_peft() -> None:
    command = [sys.executable, "-P", "-W", "ignore", "-c", COMPARE]
    environment = {**os.environ, "PYTHONPATH": str(TOP / "checks")}

    done = subprocess.run(command, env=environment, cwd=TOP, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert list(differences) == ["outputs", "gradients", "merged weights"]
    assert all(0 <= difference < 1e-12 for difference in differences.values()), differences
