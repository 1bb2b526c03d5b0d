"""Wide grids of tests: what stands for the others runs every time, the others in the heavy group."""

import pytest


def wide(cases, every_time):
    """`cases`, those outside `every_time` marked heavy; all of `every_time` are among them."""
    assert set(every_time) <= set(cases), f"{set(every_time) - set(cases)} are no cases"
    return [case if case in every_time else _heavy(case) for case in cases]


def _heavy(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.heavy)
