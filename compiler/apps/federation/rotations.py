"""Putting together low-rank interventions: R keeps orthonormal rows, and rotations of it change no result.

An intervention is h + R^T (W h + b - R h) with R, W [r, d], b [r]; states name these arrays `PATH.R`, `PATH.W`,
`PATH.b`. The mean of orthonormal matrices is not orthonormal (three random 64 x 4: singular values .49 to .68), and
(Q R, Q W, Q b) is the same function for any rotation Q, so that the mean of two clients that learned the same in
rotated bases is neither. Three ways to combine:

    project    entry by entry, then the nearest orthonormal R
    align      first every client's rows are rotated towards the receiver's (orthogonal Procrustes), then project
    function   the functions are averaged: M = R^T (W - R) and c = R^T b, then the best R, W, b of rank r for them

Arrays of other names are combined entry by entry in all three.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from .state import State, weighted_sum

Way = Literal["project", "align", "function"]


def nearest_orthonormal_rows(rows: np.ndarray) -> np.ndarray:
    """The nearest matrix with orthonormal rows, [r, d]."""
    left, _, right = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    return (left @ right).astype(rows.dtype)


def intervention_paths(state: State) -> list[str]:
    """Interventions of a state: the paths that have R, W and b."""
    return sorted(
        name[:-2] for name in state if name.endswith(".R") and f"{name[:-2]}.W" in state and f"{name[:-2]}.b" in state
    )


def align_rotation(state: State, reference: State) -> dict[str, np.ndarray]:
    """Rotated equivalent of a state whose rows of R are as near as possible to those of `reference`."""
    result = dict(state)
    for path in intervention_paths(state):
        R = state[f"{path}.R"].astype(np.float64)
        left, _, right = np.linalg.svd(reference[f"{path}.R"].astype(np.float64) @ R.T)  # [r, r]
        rotation = left @ right
        for part in ("R", "W", "b"):
            array = state[f"{path}.{part}"]
            result[f"{path}.{part}"] = (rotation @ array.astype(np.float64)).astype(array.dtype)
    return result


def with_orthonormal_rotations(state: State) -> dict[str, np.ndarray]:
    """With orthonormal R again."""
    return {
        name: nearest_orthonormal_rows(array)
        if name.endswith(".R") and name[:-2] in intervention_paths(state)
        else array
        for name, array in state.items()
    }


def weighted_intervention_mean(
    states: Mapping[int, State], shares: Mapping[int, float], reference: State, way: Way
) -> dict[str, np.ndarray]:
    """The sum of share * state (shares sum to 1) with orthonormal R, in the basis nearest to that of `reference`."""
    used = {k: states[k] for k in sorted(states) if shares.get(k)}
    if way == "project":
        return with_orthonormal_rotations(weighted_sum(used, shares))
    aligned_states = {k: align_rotation(state, reference) for k, state in used.items()}
    result = weighted_sum(aligned_states, shares)
    if way == "align":
        return with_orthonormal_rotations(result)
    for path in intervention_paths(result):
        result |= _best_rank_r_mean([(shares[k], aligned_states[k]) for k in aligned_states], path)
    return align_rotation(result, reference)


def _best_rank_r_mean(weighted_states: list[tuple[float, State]], path: str) -> dict[str, np.ndarray]:
    """R, W, b of the best function of rank r for the weighted mean of functions.

    [M | c] = sum share R^T [W - R | b] is a product of two tall factors, so its singular vectors come from two
    QR decompositions and a small SVD.
    """
    R = np.concatenate([state[f"{path}.R"].astype(np.float64) for _, state in weighted_states])  # [k r, d]
    edit = np.concatenate([share * _edit_matrix(state, path) for share, state in weighted_states])  # [k r, d + 1]
    rank = weighted_states[0][1][f"{path}.R"].shape[0]
    basis, upper = np.linalg.qr(R.T)  # [d, m]
    inner = upper @ edit
    left, _, _ = np.linalg.svd(inner, full_matrices=True)  # [m, m]
    rows = (basis @ left[:, :rank]).T  # [r, d]
    values = rows @ R.T @ edit  # [r, d + 1]
    dtype = weighted_states[0][1][f"{path}.W"].dtype
    return {
        f"{path}.R": rows.astype(weighted_states[0][1][f"{path}.R"].dtype),
        f"{path}.W": (rows + values[:, :-1]).astype(dtype),
        f"{path}.b": values[:, -1].astype(dtype),
    }


def _edit_matrix(state: State, path: str) -> np.ndarray:
    """[W - R | b], [r, d + 1]."""
    R, W, b = (state[f"{path}.{part}"].astype(np.float64) for part in ("R", "W", "b"))
    return np.concatenate([W - R, b[:, None]], axis=1)


def function_gram(states: Mapping[int, State]) -> np.ndarray:
    """Inner products of the functions of clients, [k, k], around the first: rotations don't change them."""
    from .state import flat_float64

    order = sorted(states)
    names = intervention_paths(states[order[0]])
    inner = {f"{path}.{part}" for path in names for part in ("R", "W", "b")}
    plain_parts = {k: {n: a for n, a in states[k].items() if n not in inner} for k in order}
    gram = np.zeros((len(order), len(order)))
    for i, a in enumerate(order):
        for j, b in enumerate(order[: i + 1]):
            value = float(flat_float64(plain_parts[a]) @ flat_float64(plain_parts[b])) if plain_parts[a] else 0.0
            for path in names:
                overlap = states[a][f"{path}.R"].astype(np.float64) @ states[b][f"{path}.R"].astype(np.float64).T
                value += float((overlap * (_edit_matrix(states[a], path) @ _edit_matrix(states[b], path).T)).sum())
            gram[i, j] = gram[j, i] = value
    return gram - gram[:1] - gram[:, :1] + gram[0, 0]
