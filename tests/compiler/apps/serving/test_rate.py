"""How often one client may ask."""

import asyncio
import json

import pytest
from effc.compiler.apps.serving.access_log import AccessLog
from effc.compiler.apps.serving.connection import has_too_many_connections
from effc.compiler.apps.serving.error_response import ErrorResponse
from effc.compiler.apps.serving.guard import Admission, Guard
from effc.compiler.apps.serving.keys import Keys
from effc.compiler.apps.serving.limits import Limits
from effc.compiler.apps.serving.rate import ErrorPace, RateLimit
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def granted(rate, client) -> bool:
    try:
        rate.count_or_refuse(client)
    except ErrorResponse:
        return False
    return True


@given(per_minute=st.integers(1, 600), pauses=st.lists(st.floats(0, 5), min_size=1, max_size=80))
def test_over_any_time_no_more_is_granted_than_the_rate_and_a_burst(per_minute, pauses):
    clock = Clock()
    rate, total = RateLimit(per_minute, clock), 0
    for pause in pauses:
        clock.now += pause
        total += granted(rate, "a")
        assert total <= rate.burst + clock.now * per_minute / 60 + 1e-6


def test_one_who_waits_as_told_is_let_in_and_others_are_not_held_up():
    clock = Clock()
    rate = RateLimit(12, clock)
    assert [granted(rate, "a") for _ in range(4)] == [True, True, True, False] and granted(rate, "b")
    with pytest.raises(ErrorResponse) as refused:
        rate.count_or_refuse("a")
    clock.now += int(refused.value.headers["Retry-After"])
    assert refused.value.status == 429 and granted(rate, "a")


def test_clients_that_are_made_up_do_not_fill_the_memory():
    rate = RateLimit(1, Clock())
    for number in range(10_050):
        rate.count_or_refuse(str(number))
    assert len(rate._buckets) == 10_000


def asked(guard, path, key=""):
    """The status and the body of a request to an application behind a guard."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers, "client": ("10.0.0.1", 1)}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent)


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"well"})


def test_errors_of_one_client_are_sent_one_every_20_ms_and_those_of_another_at_once():
    clock = Clock()
    pace = ErrorPace(clock)
    assert [round(pace.delay("a"), 3) for _ in range(4)] == [0, 0.02, 0.04, 0.06]
    assert pace.delay("b") == 0
    clock.now = 0.5
    assert pace.delay("a") == 0
    assert max(pace.delay("a") for _ in range(1000)) == 1  # whoever else is behind that address waits no longer
    clock.now = 2.0
    assert pace.delay("a") == 0


def test_a_guard_counts_by_key_and_lets_health_be_asked_always():
    keys = ["a-key-of-sixteen-1", "a-key-of-sixteen-2"]
    admission = Admission(Keys(keys), rate=RateLimit(4, Clock()))
    guard = Guard(application, admission, Limits(), AccessLog(None), lambda *_: None)
    assert asked(guard, "/v1/models", keys[0])[0] == 200
    status, body = asked(guard, "/v1/models", keys[0])
    assert status == 429 and json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    assert asked(guard, "/v1/models", keys[1])[0] == 200
    assert all(asked(guard, "/health", keys[0])[0] == 200 for _ in range(9))


def test_an_address_of_another_machine_has_a_share_of_the_connections():
    addresses = ["10.0.0.1"] * 64 + ["10.0.0.2"] * 60 + ["127.0.0.1"] * 90
    assert [has_too_many_connections(f"10.0.0.{n}", addresses, 63) for n in (1, 2)] == [True, False]
    assert not has_too_many_connections("127.0.0.1", addresses, 63)  # a proxy's
    assert [Limits(connections=n).max_connections_per_address for n in (256, 1)] == [64, 1]
