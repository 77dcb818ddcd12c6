"""Truncated SVD without centring: dense in pieces and sparse, against numpy's."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from toolkit.retrieval.reduce import sparse_svd_basis, svd_basis, unit


def matrix() -> np.ndarray:
    """Rows far from zero, so that centring would matter."""
    draw = np.random.default_rng(0)
    return draw.normal(size=(80, 6)) @ draw.normal(size=(6, 24)) + 2 + 0.1 * draw.normal(size=(80, 24))


def projector(basis: np.ndarray) -> np.ndarray:
    wide = basis.astype(np.float64)
    return wide @ wide.T


@pytest.mark.parametrize("sparse", [False, True])
def test_the_basis_spans_the_largest_singular_vectors(sparse: bool):
    rows = matrix()
    if sparse:
        rows = np.where(np.abs(rows) > 1, rows, 0)
    found = sparse_svd_basis(csr_array(rows), 5) if sparse else svd_basis(np.split(rows, [7, 50]), 5)
    right = np.linalg.svd(rows)[2]
    assert found.shape == (24, 5) and found.dtype == np.float32
    assert np.abs(np.abs((found.T @ right[:5].T).diagonal()) - 1).max() < 1e-5  # in this order, up to the sign
    assert np.abs(projector(found) - projector(right[:5].T)).max() < 1e-5
    centred = np.linalg.svd(rows - rows.mean(0))[2][:5].T
    assert np.abs(projector(found) - projector(centred)).max() > 1e-2  # the control


def test_sparse_and_dense_agree_and_are_the_same_again():
    rows = np.where(np.abs(matrix()) > 1, matrix(), 0)
    sparse = sparse_svd_basis(csr_array(rows), 5)
    assert np.abs(projector(sparse) - projector(svd_basis([rows], 5))).max() < 1e-5
    assert np.array_equal(sparse, sparse_svd_basis(csr_array(rows), 5))


@pytest.mark.parametrize(
    ("rows", "dim", "problem"),
    [
        ((80, 24), 25, "25 dimensions cannot be had from vectors of 24 dimensions; lower it to 24 or less"),
        ((10, 24), 12, "12 dimensions cannot be had from 10 different queries; lower it to 10 or less"),
    ],
)
def test_more_dimensions_than_there_are(rows: tuple[int, int], dim: int, problem: str):
    with pytest.raises(ValueError, match=f"^{problem}$"):
        svd_basis([np.ones(rows)], dim)


def test_more_dimensions_than_words_less_one():
    told = r"^24 dimensions cannot be had from 80 different queries of 24 words; lower it to 23 or less$"
    with pytest.raises(ValueError, match=told):
        sparse_svd_basis(csr_array(matrix()), 24)
    assert sparse_svd_basis(csr_array(matrix()), 23).shape == (24, 23)


def test_unit_length_but_for_zero():
    found = unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert found.dtype == np.float32 and np.allclose(found, [[0.6, 0.8], [0, 0]])
