"""What make's targets do, a module each."""
