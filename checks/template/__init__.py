"""What judges ex99, A title."""
