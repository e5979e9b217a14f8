"""What judges ex42, doubling."""
