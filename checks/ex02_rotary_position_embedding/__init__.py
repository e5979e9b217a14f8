"""What judges ex02, Rotary position embedding."""
