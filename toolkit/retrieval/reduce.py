"""Truncated SVD of vectors without centring (CDE, arXiv 2410.02525): fitted on some, then applied to all.

Called by the vectors of a surrogate.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from toolkit.determinism import generator

FIT_ROWS = 100_000  # queries that it is fitted on, the first ones


def svd_basis(blocks: Iterable[np.ndarray], dim: int) -> np.ndarray:
    """The right singular vectors of the largest singular values: fp32 [width, dim]; held is a matrix of width^2.

    Args:
        blocks: the rows in pieces, [any, width] each.

    Raises:
        ValueError: if `dim` is above the width or the number of rows.
    """
    gram, rows = np.zeros((1, 1)), 0  # grows to [width, width] with the first block
    for block in blocks:
        wide = block.astype(np.float64)
        gram = gram + wide.T @ wide
        rows += len(block)
    check_dim(dim, rows, len(gram))
    return np.linalg.eigh(gram)[1][:, ::-1][:, :dim].astype(np.float32)  # eigh sorts from the least


def sparse_svd_basis(rows: csr_array, dim: int) -> np.ndarray:
    """`svd_basis` of sparse rows: fp32 [width, dim].

    Raises:
        ValueError: unless `dim` is below both their number and their width.
    """
    count, width = rows.shape  # pyright: ignore[reportGeneralTypeIssues]
    most = min(count, width) - 1
    if dim > most:
        problem = f"{dim} dimensions cannot be had from {count:,} different queries of {width:,} words"
        raise ValueError(f"{problem}; lower it to {most} or less")
    start = generator("svd").standard_normal(min(count, width))
    right: Any = svds(rows, k=dim, v0=start, return_singular_vectors="vh")[2]  # pyright: ignore[reportArgumentType]
    return np.ascontiguousarray(right[::-1].T, np.float32)


def check_dim(dim: int, rows: int, width: int) -> None:
    """Raise ValueError if there are not so many dimensions in so many rows."""
    if dim > min(rows, width):
        of = f"{rows:,} different queries" if rows < width else f"vectors of {width:,} dimensions"
        raise ValueError(f"{dim} dimensions cannot be had from {of}; lower it to {min(rows, width)} or less")


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of unit length: fp32 [n, dim]; zero ones stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms == 0, 1, norms)).astype(np.float32)
