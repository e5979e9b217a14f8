"""What only maintainers and the project's own tests run."""
