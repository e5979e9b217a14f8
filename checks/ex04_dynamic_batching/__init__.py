"""What judges ex04, Dynamic batching."""
