"""What judges ex08, Vision tokens in a language decoder."""
