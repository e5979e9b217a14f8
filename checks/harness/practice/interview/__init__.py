"""Mock interviews: a problem with its signatures, questions to ask, a clock, and a report."""
