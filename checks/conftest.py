"""Hooks pytest up with the harness; everything else lives there."""

pytest_plugins = ["harness.testing.check", "harness.runner.plugin", "harness.runner.timeout"]
