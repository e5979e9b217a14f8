"""What judges ex11, Speculative decoding."""
