"""What judges ex06, Gradient checkpointing."""
