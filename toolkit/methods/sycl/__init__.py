"""The SyCL method: queries against passages of several grades of relevance, by list-wise losses."""
