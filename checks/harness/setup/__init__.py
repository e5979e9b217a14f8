"""Setting the workspace up, and finding out what works in it."""
