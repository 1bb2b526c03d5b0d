"""States of clients: their hashes, and the median that strategies must agree with."""

import hashlib
from collections.abc import Mapping

import numpy as np
from effc.compiler.apps.federation.median import centered_gram, geometric_median_shares
from effc.compiler.apps.federation.state import State, normalized_weights, weighted_sum
from effc.compiler.core.cache import canonical_json_sha256


def state_hash(state: State) -> str:
    """sha256 over names, shapes and bits."""
    body = {
        name: [list(a.shape), str(a.dtype), hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()]
        for name, a in state.items()
    }
    return canonical_json_sha256(body)


def geometric_median(states: Mapping[int, State], weights: Mapping[int, float]) -> dict[str, np.ndarray]:
    """The state with the least weighted sum of distances to the given ones, each taken as one vector."""
    used = normalized_weights(weights)
    states = {k: states[k] for k in used}
    shares = geometric_median_shares(centered_gram(states), np.array([used[k] for k in sorted(used)]))
    return weighted_sum(states, dict(zip(sorted(used), shares.tolist(), strict=True)))
