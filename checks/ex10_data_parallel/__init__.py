"""What judges ex10, Data parallel training."""
