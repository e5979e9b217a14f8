"""What an exercise, a submission and a verdict are: text and data, without torch."""
