"""What judges ex05, LoRA."""
