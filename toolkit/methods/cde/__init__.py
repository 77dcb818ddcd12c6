"""The cde method (arXiv 2410.02525): texts are read together with vectors of the documents around them."""
