"""Checkpoint of a server after every round: its strategy's states and how the rounds went."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ....dsl.syntax.diagnostics import Fault
from .state import State

_SEPARATOR = "|"

other_threads = Fault(
    "other-threads",
    "A federation that was stopped goes on with another number of threads than it began with.\n\n"
    "Sums differ in their last digits with the number of threads, so nobody could repeat a run with rounds of both.",
    exit="usage",
)


class Checkpoint:
    """Whole or not at all, of one federation: another `identity` in the same folder is not read."""

    def __init__(self, folder: Path, identity: str):
        from ...transforms.training.run_files import RunCheckpoints

        self._saved = RunCheckpoints(folder, identity)

    def write_round(self, round_number: int, states: Mapping[str, State], run_json: Mapping[str, Any]) -> None:
        import torch

        flat = {
            f"{name}{_SEPARATOR}{key}": torch.from_numpy(np.ascontiguousarray(array))
            for name, state in states.items()
            for key, array in state.items()
        }
        if flat:
            self._saved.write_tensors(f"state-{round_number}", flat)
        run_json = {**run_json, "number": round_number, "threads": torch.get_num_threads()}
        self._saved.write_manifest_and_prune_folders(run_json, [f"state-{round_number}"] if flat else [])

    def read_last_round(self) -> tuple[dict[str, State], dict[str, Any]] | None:
        """The states and the body of the last round that was kept; None where there is none.

        Raises Reject (other-threads) where it was computed with another number of threads.
        """
        import torch

        body = self._saved.read_checkpoint_and_clean_up()
        if body is None:
            return None
        threads = body.pop("threads", torch.get_num_threads())  # older checkpoints don't say
        if threads != torch.get_num_threads():
            raise other_threads(
                f"round {body['number']} was computed with {threads} threads, and there are "
                f"{torch.get_num_threads()} now",
                help=f"go on with --threads {threads}, or remove {self._saved.folder} to begin anew",
            ).rejection()
        states: dict[str, dict[str, np.ndarray]] = {}
        for full, tensor in self._saved.load_tensors(f"state-{body['number']}").items():
            name, _, key = full.partition(_SEPARATOR)
            states.setdefault(name, {})[key] = tensor.numpy().copy()
        return dict(states), body

    def clear(self) -> None:
        import shutil

        shutil.rmtree(self._saved.folder, ignore_errors=True)
