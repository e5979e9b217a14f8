"""What judges the exercises. A package, so that no module of it carries the name of a submission's."""
