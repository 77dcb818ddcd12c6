"""The one place that drives a DeepSpeed engine: the loop of a stage, and what it is told of it."""
