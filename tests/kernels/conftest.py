"""Every test of a kernel runs at every level that this machine has, and names those it lacks."""

import pytest
from effc.kernels import levels


@pytest.fixture(params=[*levels.NAMES, levels.MODEL])
def level(request):
    """Kernels run at this level within the test."""
    if reason := levels.unavailable_reason(request.param):
        pytest.skip(f"{request.param}: {reason}")
    with levels.at_forced_level(request.param):
        yield request.param
