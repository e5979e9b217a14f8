"""Hooks pytest up with the harness; everything else lives there."""

pytest_plugins = ["harness.runner.plugin", "harness.runner.timeout"]
