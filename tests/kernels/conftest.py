"""Every test of a kernel runs at every level that this machine has, and names those it lacks."""

import pytest
from effc.kernels import levels


@pytest.fixture(params=[*levels.NAMES, levels.MODEL])
def level(request):
    """Kernels run at this level within the test."""
    reason = "" if request.param == levels.MODEL else levels.lacking(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    with levels.forced(request.param):
        yield request.param
