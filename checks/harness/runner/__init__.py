"""Runs checks on a submission: pytest's hooks, the supervisor of worker processes, the fork server."""
