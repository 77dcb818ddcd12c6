"""Training, preparation, retrieval and export: all that a run does, but for scoring and the command line."""
