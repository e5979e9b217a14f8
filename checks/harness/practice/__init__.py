"""Practice on what is done: debug, optimise, review; sessions under practice/ that the watch judges too."""
