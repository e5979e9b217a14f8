"""Help for a learner: hints, what happened so far, earlier attempts."""
