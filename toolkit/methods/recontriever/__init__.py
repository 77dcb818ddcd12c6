"""The recontriever method (arXiv 2306.03166): crops of one text, weighted by relevance."""
