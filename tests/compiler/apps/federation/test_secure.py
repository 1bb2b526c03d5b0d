"""Rounds in which the server is given sums: the same means as in the clear, and no state."""

import numpy as np
import pytest
from effc.compiler.apps.federation.averaging import FedAvg
from effc.compiler.apps.federation.checkpoint import Checkpoint
from effc.compiler.apps.federation.personal import AllButMe
from effc.compiler.apps.federation.secure import SecureSum
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.federation.least_squares import FULL, federation

pytest.importorskip("cryptography")


def test_the_mean_is_that_of_the_clear_to_the_fixed_point():
    clear, masked = (
        federation(FedAvg(FULL), rounds=3),
        federation(SecureSum(FULL, all_but_me=False, mix=None), rounds=3),
    )
    clear.run(), masked.run()
    assert masked.course.rounds[0].bytes_up == clear.course.rounds[0].bytes_up
    for name, array in clear.strategy.results()["global"].items():
        np.testing.assert_allclose(masked.strategy.results()["global"][name], array, atol=1e-3)


def test_all_but_me_is_worked_out_by_the_clients_alone():
    clear = federation(AllButMe(FULL, "mean", "project", 0.5), rounds=3)
    masked = federation(SecureSum(FULL, all_but_me=True, mix=0.5), rounds=3)
    clear.run(), masked.run()
    for client in range(4):
        own = masked.grid.memories[client + 1]["own"]
        for name, array in clear.strategy.results()[f"client-{client}"].items():
            np.testing.assert_allclose(own[name], array, atol=1e-3)


def test_no_reply_holds_a_state_in_the_clear():
    run = federation(SecureSum(FULL, all_but_me=True, mix=0.5), rounds=2)
    seen, pull = [], run.grid.pull_messages
    run.grid.pull_messages = lambda ids: [seen.append(r) or r for r in pull(ids)]
    run.run()
    arrays = [state for reply in seen for use, state in reply.arrays.items() if reply.to and use != "masked"]
    assert arrays == [seen[4].arrays["own"]]  # the start that all draw alike
    masked = [reply.arrays["masked"]["sum"] for reply in seen if "masked" in reply.arrays]
    assert len(masked) == 8 and all(v.dtype == np.uint32 for v in masked)
    bits = np.unpackbits(np.concatenate(masked).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.05  # as good as drawn: 8 * 56 numbers of 32 bits


def test_a_client_lost_between_training_and_the_sum_is_left_out_of_both():
    class Lost:
        def __init__(self, client):
            self.client = client

        def __call__(self, message, memory):
            if message.kind == "masked" and message.number == 2:
                raise RuntimeError("gone")
            return self.client(message, memory)

    run = federation(SecureSum(FULL, all_but_me=False, mix=None), rounds=3)
    run.grid.clients[2] = Lost(run.grid.clients[2])
    course = run.run()
    assert course.rounds[1].faults == {1: "gone"} and sorted(course.rounds[1].updates) == [0, 2, 3]
    assert run.strategy.summed == (0, 1, 2, 3)
    assert course.rounds[2].loss < course.rounds[0].loss


def test_a_sum_of_two_is_refused_by_server_and_client():
    run = federation(SecureSum(FULL, all_but_me=False, mix=None), clients=2)
    with pytest.raises(Reject) as refused:
        run.run()
    assert "a sum hides the states of 3 or more" in str(refused.value)


def test_a_killed_server_goes_on_with_the_mean(tmp_path):
    federation(SecureSum(FULL, all_but_me=False, mix=None), rounds=2, checkpoint=Checkpoint(tmp_path, "s")).run()
    again = federation(SecureSum(FULL, all_but_me=False, mix=None), rounds=4, checkpoint=Checkpoint(tmp_path, "s"))
    whole = federation(SecureSum(FULL, all_but_me=False, mix=None), rounds=4)
    again.run(), whole.run()
    for name, array in whole.strategy.results()["global"].items():
        np.testing.assert_array_equal(again.strategy.results()["global"][name], array)
