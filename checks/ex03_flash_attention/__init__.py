"""What judges ex03, Memory-efficient (flash) attention."""
