"""The judge behind every check. Check files import from `harness.door`."""
