"""The revela method (arXiv 2506.16552): retrieval learnt from in-batch language modelling."""
