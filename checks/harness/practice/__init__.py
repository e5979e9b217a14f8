"""Practice beyond the exercises, and help when stuck."""
