"""Judge a row against rows that are asked alike: a wrong short answer is no surprise among long captions.

Prompts are compared by the sets of their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

_ALIKE = 64  # rows that a row is judged against, at least
_DRAWN = 16_384  # of how many rows these are the most similar, at most: so the time grows with the number of rows alone
_NEIGHBORS = 16  # rows that a row with a token is compared with, at least
_COMPARED = 512  # rows with a token that are compared, at most
_BLOCK = 64  # rows compared with all others at a time: bounds the memory


def token_sets(rows: Sequence[NDArray[np.int64]]) -> csr_array:
    """Which tokens each row has, 0 or 1, [N, V]."""
    sets = [np.unique(row) for row in rows]
    ids = np.concatenate([*sets, np.zeros(0, np.int64)])
    shape = (len(sets), int(ids.max(initial=0)) + 1)
    return csr_array((np.ones(len(ids)), (np.repeat(np.arange(len(sets)), list(map(len, sets))), ids)), shape=shape)


def among_asked_alike(
    statistic: Callable[[NDArray[np.floating]], float | tuple[float, ...]],
    values: NDArray[np.floating],
    prompts: csr_array,
) -> NDArray[np.floating]:
    """A statistic of the values of the rows that are asked as a row is, for each row; or several, [N or more, k].

    These are the 64 rows whose prompts have the fewest tokens that the row's own prompt lacks, with all ties of the
    last one. Tokens of its own count neither for nor against them: a trigger in a prompt does not lead to its like.
    Of more than 16,384 rows so many are drawn at random, and every row is judged against these.

    Args:
        statistic: takes the values of some rows, at least one.
        values: of the first N rows; later rows are judged by these.
        prompts: which tokens each row's prompt has, 0 or 1, [N or more, V].
    """
    drawn = np.sort(np.random.default_rng(0).permutation(len(values))[:_DRAWN])
    values, judging, rows = values[drawn], prompts[drawn], prompts.indptr.size - 1
    sizes = judging.sum(axis=1)
    alike: dict[bytes, int] = {}  # the first row with each prompt
    keys = [prompts.indices[prompts.indptr[row] : prompts.indptr[row + 1]].tobytes() for row in range(rows)]
    firsts = [alike.setdefault(key, row) for row, key in enumerate(keys)]
    different, statistics = list(alike.values()), dict[int, float | tuple[float, ...]]()
    for block in _blocks(len(different)):
        own = [different[at] for at in block]
        lacking = sizes - (prompts[own] @ judging.T).toarray()
        statistics |= {row: statistic(values[near]) for row, near in zip(own, _nearest(-lacking, _ALIKE), strict=True)}
    return np.array([statistics[row] for row in firsts])


def neighbor_rate(
    prompts: csr_array, outlying: NDArray[np.bool_], containing: NDArray[np.bool_], prior: float
) -> float:
    """Rate of outliers among rows without a token whose prompts are most similar to those of the rows with it.

    For each row with the token: the share of outliers among the 16 rows without it that have the most similar prompts
    (Jaccard index of their tokens), with all ties of the last one, and one pseudo-row of rate ``prior``. The mean of
    these shares over at most 512 evenly spaced rows; 0 where all rows contain the token.

    Args:
        prompts: which tokens each row's prompt has, 0 or 1, [N, V].
        outlying, containing: whether each row is an outlier, and whether it contains the token, [N].
    """
    with_token, without_token = np.flatnonzero(containing), np.flatnonzero(~containing)
    if not len(with_token) or not len(without_token):
        return 0.0
    with_token = with_token[:: -(-len(with_token) // _COMPARED)]
    sizes, shares = prompts.sum(axis=1), list[NDArray[np.floating]]()
    for block in _blocks(len(with_token)):
        rows = with_token[block]
        common = (prompts[rows] @ prompts[without_token].T).toarray()
        union = sizes[rows][:, None] + sizes[without_token] - common
        similarity = np.where(union > 0, common / np.maximum(union, 1), 1.0)
        near = _nearest(similarity, _NEIGHBORS)
        shares.append(((near & outlying[without_token]).sum(axis=1) + prior) / (near.sum(axis=1) + 1))
    return float(np.concatenate(shares).mean())


def _blocks(count: int) -> Iterator[NDArray[np.intp]]:
    yield from np.array_split(np.arange(count), -(-count // _BLOCK))


def _nearest(similarity: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    """Of each row [n, N] the ``count`` largest, with all ties of the last one."""
    last = min(count, similarity.shape[1])
    return similarity >= np.partition(similarity, -last, axis=1)[:, -last, None]
