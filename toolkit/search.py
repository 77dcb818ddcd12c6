"""Exact top-k by inner product: faiss on the CPU, blocks of torch on CUDA. Called by evaluation."""

import numpy as np
import torch

DOCUMENT_BLOCK, QUERY_BLOCK = 16384, 256


def top_k(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The documents with the largest inner products, best first; equal scores are ordered by index.

    Args:
        queries: fp32 [q, dim].
        documents: fp32 [n, dim].
        k: results per query; min(k, n) are returned.

    Returns:
        scores fp32 [q, min(k, n)], indices int64 [q, min(k, n)].

    Raises:
        ValueError: if the widths differ, there is no document or k < 1.
        ImportError: on a machine without CUDA, if faiss is missing; says how to install it.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries {queries.shape} and documents {documents.shape} are not matrices of one width")
    if k < 1 or not len(documents):
        raise ValueError(f"nothing to find: k = {k}, {len(documents)} documents")
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    documents = np.ascontiguousarray(documents, dtype=np.float32)
    k = min(k, len(documents))
    wanted = min(k + 1, len(documents))  # one more shows whether a tie is cut
    search = _search_torch if torch.cuda.is_available() else _search_faiss
    scores, indices = search(queries, documents, wanted)
    order = np.lexsort((indices, -scores), axis=1)
    scores, indices = np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)
    if wanted > k:  # which of the tied documents a library keeps is its own choice: choose again, by index
        for row in np.flatnonzero(scores[:, k] == scores[:, k - 1]):
            products = documents @ queries[row]
            indices[row, :k] = best(products, k)
            scores[row, :k] = products[indices[row, :k]]
    return scores[:, :k], indices[:, :k]


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of [n] scores, best first; equal scores are ordered by index."""
    chosen = np.arange(len(scores))
    if k < len(scores):
        limit = np.partition(scores, -k)[-k]
        above = np.flatnonzero(scores > limit)
        chosen = np.concatenate([above, np.flatnonzero(scores == limit)[: k - len(above)]])
    return chosen[np.lexsort((chosen, -scores[chosen]))]


def _search_faiss(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f'faiss cannot be imported ({error}); pip install "toolkit[cpu]", or "toolkit[gpu]" on a machine with CUDA'
        ) from error
    return faiss.knn(queries, documents, k, metric=faiss.METRIC_INNER_PRODUCT)


def _search_torch(
    queries: np.ndarray, documents: np.ndarray, k: int, device: str = "cuda"
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of documents cross the bus once; the running k best stay on the device."""
    best_scores = torch.zeros((len(queries), 0), device=device)
    best_indices = torch.zeros((len(queries), 0), dtype=torch.int64, device=device)
    on_device = torch.from_numpy(queries).to(device)
    for first in range(0, len(documents), DOCUMENT_BLOCK):
        block = torch.from_numpy(documents[first : first + DOCUMENT_BLOCK]).to(device).T  # [dim, block]
        columns = torch.arange(first, first + block.shape[1], device=device)
        parts = []
        for start in range(0, max(1, len(queries)), QUERY_BLOCK):  # one round without queries: their shape is kept
            rows = slice(start, start + QUERY_BLOCK)
            scores = torch.cat([best_scores[rows], on_device[rows] @ block], dim=1)
            indices = torch.cat([best_indices[rows], columns.expand(len(scores), -1)], dim=1)
            kept, at = scores.topk(min(k, scores.shape[1]), dim=1)
            parts.append((kept, indices.gather(1, at)))
        best_scores, best_indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return best_scores.cpu().numpy(), best_indices.cpu().numpy()
