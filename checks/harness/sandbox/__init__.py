"""Processes in which learners' code runs: their limits, their output, what they may do and what they replaced."""
