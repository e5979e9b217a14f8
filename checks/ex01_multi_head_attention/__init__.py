"""What judges ex01, Multi-head attention."""
