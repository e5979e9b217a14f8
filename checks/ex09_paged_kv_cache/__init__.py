"""What judges ex09, Paged key-value cache."""
