"""What hostile requests cost those who behave: bounds before work, small requests before large ones."""

import asyncio
import json
import socket
import time

import h11
import httpx
import pytest
import torch
from effc.compiler.apps.serving.api import Service
from effc.compiler.apps.serving.application import make_openai_application
from effc.compiler.apps.serving.body import _parse_and_validate
from effc.compiler.apps.serving.connection import BoundedHttp
from effc.compiler.apps.serving.error_response import ErrorResponse
from effc.compiler.apps.serving.protocol import MAX_MESSAGES, MAX_PARTS, ChatRequest
from effc.compiler.apps.serving.request_slots import SMALL, RequestSlots
from effc.compiler.apps.serving.runner import make_decoder
from effc.compiler.apps.serving.scheduler import Scheduler
from effc.compiler.apps.serving.served_models import ServedModels
from effc.compiler.apps.serving.server import open_listener
from effc.compiler.core.settings import Settings
from effc.compiler.driver.models import resolve_origin

from bench import loads

torch.set_num_threads(1)
EMPTY = {"role": "user", "content": ""}
MIB = 1 << 20
PART = {"type": "text", "text": ""}
LARGE = tuple(loads.BODIES)[:7]  # refused with 400, each by another bound


@pytest.fixture(scope="module")
def model(chatty):
    origin = resolve_origin(str(chatty), Settings(cache_dir=chatty / "cache"))
    return origin.load().eval(), origin.tokenizer()


@pytest.fixture
def app(model):
    runner, words = make_decoder(model[0], "m"), model[1]
    return make_openai_application(
        ServedModels(Service("m", Scheduler(runner, words, (), 64, 4), words, runner.context, runner.vocabulary))
    )


async def small(client: httpx.AsyncClient) -> float:
    """Seconds that a well-behaved request takes."""
    started = time.monotonic()
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "And"}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    return time.monotonic() - started


@pytest.mark.parametrize("name", LARGE)
def test_eight_large_requests_hold_up_no_small_one(app, name):
    async def run() -> list[float]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client,
        ):
            await small(client)
            headers = {"content-type": "application/json"}
            path, body = loads.BODIES[name][0], loads.BODIES[name][1]()
            posts = [asyncio.create_task(client.post(path, content=body, headers=headers)) for _ in range(8)]
            seconds = [await small(client) for _ in range(10)]
            assert {(await post).status_code for post in posts} == {400}
            return seconds

    seconds = sorted(asyncio.run(run()))
    assert seconds[8] < 1.0, seconds  # 20 to 40 s before there were bounds; alone it takes some hundredths


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([EMPTY] * (MAX_MESSAGES + 1), "messages"),
        ([{"role": "user", "content": [PART] * (MAX_PARTS // 2)}] * 3, "parts"),
    ],
)
def test_messages_and_parts_are_counted_before_one_is_read(messages, what):
    body = json.dumps({"model": "m", "messages": messages}).encode()
    with pytest.raises(ErrorResponse) as refused:
        _parse_and_validate(body, ChatRequest)
    assert refused.value.status == 400 and f" {what}, and" in str(refused.value.body)


@pytest.mark.parametrize("item", ["[]", '"a"'])
def test_parts_of_a_body_are_counted_before_it_is_parsed(item):
    body = f'{{"model": "m", "messages": [{",".join([item] * 100_000)}]}}'.encode()
    with pytest.raises(ErrorResponse, match="") as refused:
        _parse_and_validate(body, ChatRequest)
    assert "the body has more than" in str(refused.value.body)


@pytest.mark.parametrize(("size", "count", "passes"), [(1, 140, False), (1, 128, True), (1024, 4096, True)])
def test_pieces_of_a_body_are_of_some_size_on_average(size, count, passes):
    connection = BoundedHttp(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: m\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.receive_data((b"%x\r\n" % size + b" " * size + b"\r\n") * count + b"0\r\n\r\n")
    try:
        while not isinstance(connection.next_event(), h11.EndOfMessage):
            pass
    except h11.RemoteProtocolError as error:
        assert not passes and error.error_status_hint == 413
    else:
        assert passes


@pytest.mark.parametrize("name", ["str", "list[Part]", "a"])
def test_a_field_that_is_not_known_is_named_whatever_its_name_is(name):
    body = json.dumps({"model": "m", "messages": [EMPTY], name: 1}).encode()
    with pytest.raises(ErrorResponse) as refused:
        _parse_and_validate(body, ChatRequest)
    assert refused.value.body["error"]["message"] == f"`{name}` is not known here"


@pytest.mark.parametrize(
    ("content", "path", "message"),
    [
        (5, "messages.1.content", "it is neither a text nor a list of parts"),
        ([{"type": "text"}], "messages.1.content.0.text", "field required"),
        ([{"type": "image", "text": ""}], "messages.1.content.0.type", "input should be 'text'"),
    ],
)
def test_content_that_is_neither_text_nor_parts_is_named_by_its_path(content, path, message):
    body = json.dumps({"model": "m", "messages": [EMPTY, {"role": "user", "content": content}]}).encode()
    with pytest.raises(ErrorResponse) as refused:
        _parse_and_validate(body, ChatRequest)
    error = refused.value.body["error"]
    assert (error["param"], error["message"]) == (path, f"`{path}`: {message}")


def test_values_of_a_body_are_counted_before_it_is_parsed():
    body = json.dumps({"model": "m", "messages": [], "metadata": {"a": [5] * 300_000}}).encode()
    with pytest.raises(ErrorResponse) as refused:
        _parse_and_validate(body, ChatRequest)
    assert "the body has more than 262144 values" in str(refused.value.body)


@pytest.mark.parametrize("text", ['[{"\\', ",,,,,,,,,,"])
def test_brackets_and_commas_in_a_text_are_no_lists_and_values(text):
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text * 30_000}]}).encode()
    assert len(_parse_and_validate(body, ChatRequest).messages) == 1


@pytest.mark.parametrize("body", [b"[" * MIB, b'"\\"' * MIB, b'{"a":' * 30_000, b'"' + b"[" * MIB])
def test_bodies_that_are_no_json_are_refused_in_time(body):
    started = time.monotonic()
    with pytest.raises(ErrorResponse):
        _parse_and_validate(body, ChatRequest)
    assert time.monotonic() - started < 2


def test_as_many_messages_as_may_be_are_read():
    body = json.dumps({"model": "m", "messages": [EMPTY] * MAX_MESSAGES}).encode()
    assert len(_parse_and_validate(body, ChatRequest).messages) == MAX_MESSAGES


def test_large_requests_of_one_client_take_turns_and_small_ones_pass():
    async def run() -> list[str]:
        turns, order = RequestSlots(), []

        async def work(name: str, client: str, size: int, pause: float) -> None:
            async with turns.wait_for_slot(client, size):
                order.append(f"{name} begins")
                await asyncio.sleep(pause)
                order.append(f"{name} ends")

        await asyncio.gather(work("large", "a", MIB, 0.1), work("next", "a", MIB, 0.1), work("small", "a", SMALL, 0.01))
        return order

    order = asyncio.run(run())
    assert order.index("small ends") < order.index("large ends") < order.index("next begins")


@pytest.mark.parametrize("size", [SMALL, MIB])
def test_another_client_waits_for_one_turn_of_a_client_at_most_and_work_for_half_of_the_time(size):
    async def run() -> tuple[list[str], float]:
        slots, order, started = RequestSlots(), [], time.monotonic()

        async def work(client: str) -> None:
            async with slots.wait_for_slot(client, size):
                await asyncio.sleep(0.02)
                order.append(client)

        greedy = [asyncio.create_task(work("greedy")) for _ in range(8)]
        await asyncio.sleep(0)
        await work("other")
        await asyncio.gather(*greedy)
        return order, time.monotonic() - started

    order, seconds = asyncio.run(run())
    at_once = 2 if size == SMALL else 1
    assert order.index("other") <= at_once
    assert seconds >= (8 / at_once - 0.5) * 2 * 0.02  # each turn comes back after as long again


def test_a_wait_for_others_is_no_work_of_a_client():
    async def run() -> float:
        slots = RequestSlots()

        async def work(client: str, seconds: float) -> None:
            async with slots.wait_for_slot(client, MIB):
                await asyncio.sleep(seconds)

        other = asyncio.create_task(work("other", 0.3))
        await asyncio.sleep(0)
        await work("quick", 0)  # behind the other's
        await other
        started = time.monotonic()
        await work("quick", 0)
        return time.monotonic() - started

    assert asyncio.run(run()) < 0.1


def test_a_client_whose_large_requests_wait_is_told_to_come_back():
    async def run() -> int:
        turns, refused = RequestSlots(), 0

        async def work(client: str) -> None:
            nonlocal refused
            try:
                async with turns.wait_for_slot(client, 4 * MIB):
                    await asyncio.sleep(0.01)
            except ErrorResponse as error:
                refused += error.status == 429

        await asyncio.gather(*(work("a") for _ in range(12)), work("b"))
        await work("a")  # once they are answered
        return refused

    assert asyncio.run(run()) == 4


def test_connections_are_known_as_tcp_so_that_answers_wait_for_no_acknowledgement():
    """asyncio sets TCP_NODELAY by the socket's protocol; without it an answer in two segments takes 40 ms longer."""
    with open_listener("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


@pytest.fixture(scope="module")
def loaded_server(chatty):
    with loads.chat_server_url(str(chatty)) as url:
        yield url


@pytest.mark.heavy
@pytest.mark.parametrize("name", loads.KINDS)
def test_a_server_under_load_answers_others_within_a_bound(loaded_server, name):
    """Over sockets of this machine: another process sends one kind of load for five seconds."""
    alone, loaded = loads.p95_alone_and_loaded(loaded_server, name, 5)
    print(f"{name}: p95 {alone:.3f} s alone, {loaded:.3f} s under load")
    assert loaded < 0.3 + 4 * alone
