"""The positives of every query over all rows of a store of pairs. Called when the store is written."""

from array import array
from pathlib import Path

import numpy as np

from toolkit.data.token_store import TokenRows, write_tokens


def write_known(folder: Path, query_key: array, document_key: array, query_of_row: array) -> None:
    """Write `known`: of each query text, the numbers of the documents that any row pairs it with.

    Only documents that a pool can hold as something else are written: those that another query has too, or some row as
    its hard negative. The others come with their query alone, whose key leaves them out. Texts of one key are one,
    whatever their prefixes; of such documents the first stands for all. Holds a few dozen bytes for each positive of a
    row.

    Args:
        folder: with `positives` and `negatives` complete, the numbers of each row's documents.
        query_key: key of each query text.
        document_key: key of each document text.
        query_of_row: number of each row's query text.
    """
    positives = TokenRows.open(folder, "positives")
    _, query = np.unique(np.asarray(query_key), return_inverse=True)
    _, first, document = np.unique(np.asarray(document_key), return_index=True, return_inverse=True)
    asked = np.repeat(query[np.asarray(query_of_row)], np.diff(positives.offsets))
    pairs = np.unique(asked * len(document) + first[document[positives.ids]])  # in one number: sorted fast, each once
    asked, known = np.divmod(pairs, len(document))
    held = np.bincount(known, minlength=len(document)) > 1
    held[first[document[TokenRows.open(folder, "negatives").ids]]] = True
    asked, known = asked[held[known]], known[held[known]]
    ends = np.searchsorted(asked, np.arange(len(query) + 1))
    write_tokens(folder, "known", (known[ends[q] : ends[q + 1]].tolist() for q in query.tolist()))
