"""Faults of federations in recipes."""

from ....dsl.syntax.diagnostics import Fault

incompatible_strategy = Fault(
    "unfit-strategy", "A federation's strategy can't put together what its clients are to train."
)
