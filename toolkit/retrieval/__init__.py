"""Texts -> vectors -> neighbours: encoding, exact search, BM25, any retriever, and hard negatives that they find."""
