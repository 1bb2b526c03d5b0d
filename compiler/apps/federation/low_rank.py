"""Putting together adapters of low rank: the exact mean of their products, and what is cheaper.

A client's adapter of a module is B [out, r] and A [r, in], names `PATH.B` and `PATH.A`; the module's weight changes
by scale * B A with scale = alpha / r. The mean that everybody is after is sum p scale B A, of rank up to the sum of
the ranks; the mean of the factors (FedIT) is another thing: for three random clients it is off by .75 of the norm.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .state import State, normalized_weights


def lora_module_paths(state: Mapping[str, Any]) -> list[str]:
    """Paths that have both factors."""
    return sorted(name[:-2] for name in state if name.endswith(".A") and f"{name[:-2]}.B" in state)


def lora_rank(state: State) -> int:
    """The one rank of all modules."""
    ranks = {state[f"{path}.A"].shape[0] for path in lora_module_paths(state)}
    assert len(ranks) == 1, f"ranks {sorted(ranks)} in one state"
    return ranks.pop()


def weight_update_of_adapter(state: State, module_path: str, alpha: float) -> np.ndarray:
    """Weight update of a module's adapter, float64 [out, in]."""
    A, B = (state[f"{module_path}.{side}"].astype(np.float64) for side in "AB")
    return alpha / A.shape[0] * (B @ A)


def stack_factors(states: Mapping[int, State], weights: Mapping[int, float], alpha: float) -> dict[str, np.ndarray]:
    """Factors whose plain product B A, scale included, is the exact mean of the clients' updates.

    Only A is scaled, once; ranks may differ, that of the result is their sum.
    Source: FLoRA, Wang et al. 2024 (arXiv 2409.05976).
    """
    shares = normalized_weights(weights)
    first = states[min(shares)]
    result = {}
    for path in lora_module_paths(first):
        A = [shares[k] * alpha / lora_rank(states[k]) * states[k][f"{path}.A"].astype(np.float64) for k in shares]
        result[f"{path}.A"] = np.concatenate(A).astype(first[f"{path}.A"].dtype)
        result[f"{path}.B"] = np.concatenate([states[k][f"{path}.B"] for k in shares], axis=1)
    return result


def truncate_to_rank(stacked_factors: State, rank: int, alpha: float) -> dict[str, np.ndarray]:
    """The adapter of that rank whose scaled product is nearest to the stack's plain one.

    Through QR decompositions of the factors, so that the product [out, in] is never formed. A rank above what the
    product has is filled with zeros.
    Source: FlexLoRA, Bai et al. 2024 (arXiv 2402.11505).
    """
    result = {}
    for path in lora_module_paths(stacked_factors):
        A, B = (stacked_factors[f"{path}.{side}"].astype(np.float64) for side in "AB")
        left, up = np.linalg.qr(B)  # [out, m], [m, s]
        right, low = np.linalg.qr(A.T)  # [in, n], [n, s]
        u, size, v = np.linalg.svd(up @ low.T, full_matrices=False)
        keep = min(rank, len(size))
        root = np.sqrt(size[:keep] * rank / alpha)  # divides by alpha / rank, once
        result[f"{path}.B"] = _zero_padded((left @ u[:, :keep]) * root, 1, rank).astype(
            stacked_factors[f"{path}.B"].dtype
        )
        result[f"{path}.A"] = _zero_padded(root[:, None] * (v[:keep] @ right.T), 0, rank).astype(
            stacked_factors[f"{path}.A"].dtype
        )
    return result


def _zero_padded(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Zeros added along an axis up to `size`."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = (0, size - array.shape[axis])
    return np.pad(array, padding)


def resize_lora_rank(state: State, rank: int) -> dict[str, np.ndarray]:
    """The first components of an adapter, or zeros added, up to a rank; the scale of those that stay is kept.

    Down to a rank and up again gives the same as down alone.
    """
    result = {}
    for path in lora_module_paths(state):
        A, B = state[f"{path}.A"], state[f"{path}.B"]
        keep = min(rank, A.shape[0])
        factor = rank / A.shape[0]  # alpha / r was part of what B meant
        result[f"{path}.A"] = _zero_padded(A[:keep], 0, rank)
        result[f"{path}.B"] = _zero_padded((factor * B[:, :keep].astype(np.float64)).astype(B.dtype), 1, rank)
    return result


def padded_mean_weighted_by_update_norm(
    states: Mapping[int, State], weights: Mapping[int, float], alpha: float
) -> dict[str, np.ndarray]:
    """Factors of different ranks, filled up to the largest and averaged; clients count by the norm of their update.

    Source: HetLoRA, Cho et al. 2024 (arXiv 2401.06432): zero padding and sparsity-weighted aggregation.
    """
    from .state import mean

    rank = max(lora_rank(states[k]) for k in states if weights[k] > 0)
    norms = {k: _update_norm(states[k], alpha) for k in states}
    by_norm = {k: weights[k] * norms[k] for k in states}
    chosen = by_norm if sum(by_norm.values()) > 0 else dict(weights)  # nobody has learned anything yet
    return mean({k: resize_lora_rank(s, rank) for k, s in states.items()}, chosen)


def _update_norm(state: State, alpha: float) -> float:
    """Frobenius norm of the updates of all modules, from products of the factors with themselves."""
    squares = 0.0
    for path in lora_module_paths(state):
        A, B = (state[f"{path}.{side}"].astype(np.float64) for side in "AB")
        squares += float(((B.T @ B) * (A @ A.T)).sum()) * (alpha / A.shape[0]) ** 2
    return float(np.sqrt(squares))


def concatenate_stacks(stacks: list[State], alpha: float) -> dict[str, np.ndarray]:
    """Concatenate low-rank factors into one adapter whose update is the sum of the stacks' plain products."""
    result = {}
    for path in lora_module_paths(stacks[0]):
        A = np.concatenate([s[f"{path}.A"] for s in stacks])
        B = np.concatenate([s[f"{path}.B"] for s in stacks], axis=1)
        result[f"{path}.A"], result[f"{path}.B"] = A, (B * (len(A) / alpha)).astype(B.dtype)
    return result
