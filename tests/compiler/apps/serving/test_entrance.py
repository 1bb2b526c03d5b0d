"""What a stranger can't do to `effc serve`: ask without a key, send too much, or hold a connection by saying little."""

import json
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

from tests.clock import until
from tests.compiler.apps.serving.conftest import serving
from tests.compiler.cli.verbs.conftest import effc, own_cache, process  # noqa: F401

KEYS = ("first-key-0123456789", "second-key-0123456789")
SECRET = "xyzzy-a-word-of-the-prompt"


@pytest.fixture(scope="module")
def server():
    with serving(
        "zoo:tiny-llama",
        "--name",
        "tiny",
        "--timeout",
        "1",
        "--max-body",
        "64KiB",
        "--connections",
        "12",
        "--allow-host",
        "model.example",
        "--cors",
        "https://page.example",
    ) as served:
        yield served


@pytest.fixture(scope="module")
def keyed(certificate):
    """Reached from everywhere, with TLS; one key is of the environment."""
    cert, key = map(str, certificate)
    with serving(
        "zoo:tiny-llama",
        "--name",
        "tiny",
        "--host",
        "0.0.0.0",
        "--api-key",
        KEYS[0],
        "--tls-cert",
        cert,
        "--tls-key",
        key,
        "--timeout",
        "1",
        "--connections",
        "12",
        EFFC_API_KEY=f" {KEYS[1]} ,",
    ) as served:
        yield served


def raw(server, data: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    made.sendall(data)
    return made


def rest(connection) -> bytes:
    """All that comes until the server closes."""
    found = b""
    try:
        while chunk := connection.recv(65536):
            found += chunk
    except ConnectionResetError:
        pass
    return found


def said(answer: httpx.Response) -> dict:
    return answer.json()["error"]


# -- how much, and how slowly ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_body_that_is_too_large_is_told_so_whether_its_length_is_told_or_not(server):
    body = json.dumps({"model": "tiny", "prompt": "a" * 200_000}).encode()
    headers = {"content-type": "application/json"}
    known = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    pieces = (body[at : at + 9000] for at in range(0, len(body), 9000))
    unknown = httpx.post(f"{server.url}/v1/completions", content=pieces, headers=headers)
    for answer in (known, unknown):
        assert answer.status_code == 413 and said(answer)["code"] == "request_too_large"
        assert said(answer)["message"] == "the body has more than 65536 bytes, the most that this server reads"
    claim = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
    with raw(server, claim) as connection:  # refused by its claim alone
        assert rest(connection).startswith(b"HTTP/1.1 413")
    assert server.complete(max_tokens=1).usage.completion_tokens == 1


@pytest.mark.slow
def test_connections_that_never_say_a_whole_request_are_closed_and_others_are_answered(server):
    beginnings = (
        b"",
        b"GET /health HT",
        b"GET /health HTTP/1.1\r\nHost: local",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",
    )
    with ExitStack() as stack:
        open_ones = [stack.enter_context(raw(server, data)) for data in beginnings]
        assert httpx.get(f"{server.url}/health").status_code == 200
        ends = [rest(connection) for connection in open_ones]
    assert all(b"408 Request Timeout" in end for end in ends[:3])  # and the last one is closed
    assert ends[3].startswith(b"HTTP/1.1 200")


def refused_while_sending(server, head: bytes, piece: bytes, most: int) -> tuple[bytes, int]:
    """The answer to a body in pieces that has no end, and how many pieces were sent until the server closed."""
    with raw(
        server, b"POST /v1/completions HTTP/1.1\r\n" + head + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    ) as connection:
        connection.settimeout(20)
        for number in range(most):
            try:
                connection.sendall(piece)
            except (ConnectionResetError, BrokenPipeError):
                return rest(connection), number
        return rest(connection), most


def test_a_body_of_one_who_is_refused_is_not_read(server):
    piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    _, sent = refused_while_sending(server, b"Host: evil.example", piece, 4000)  # 250 MiB
    assert sent < 4000


def test_a_body_of_pieces_of_one_byte_ends_the_connection(server):
    answer, sent = refused_while_sending(server, b"Host: localhost", b"1\r\n \r\n" * 500, 5000)  # 2.5 million pieces
    assert not answer or (answer.startswith(b"HTTP/1.1 413 ") and b"in pieces of less than 256 bytes" in answer)
    assert sent < 5000
    assert server.complete(max_tokens=1).usage.completion_tokens == 1


def test_more_headers_than_any_client_sends_are_refused(server):
    lines = b"".join(b"a%d: b\r\n" % n for n in range(300))
    with raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n") as connection:
        assert rest(connection).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("most", [80_000, 250_000])
@pytest.mark.parametrize("pieces", [1, 3])
def test_headers_are_as_long_as_they_are_however_they_come(server, most, pieces):
    one, many = b"X-A: " + b"a" * most, b"\r\n".join(b"X-%d: " % n + b"a" * 1000 for n in range(most // 1000))
    target = b"/health?" + b"a" * most
    for start, header in ((b"/health", one), (b"/health", many), (target, b"X-A: a")):
        data = b"GET " + start + b" HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n\r\n"
        with raw(server, b"") as connection:
            try:
                for part in range(pieces):
                    connection.sendall(data[len(data) * part // pieces : len(data) * (part + 1) // pieces])
                    time.sleep(0.05)
            except (ConnectionResetError, BrokenPipeError):
                pass  # closed before it was all sent
            assert rest(connection)[:13] in (b"HTTP/1.1 431 ", b"")
    trailers = (
        b"POST /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + many + b"\r\n\r\n"
    )
    with raw(server, trailers) as connection:
        assert b"HTTP/1.1 200" not in rest(connection)
    short = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-A: " + b"a" * 50_000 + b"\r\n\r\n"
    with raw(server, short) as connection:
        assert rest(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_headers_that_trickle_in_have_no_more_time_than_others(server):
    with raw(server, b"GET /health HTTP/1.1\r\n") as connection:
        for at in range(100):
            try:
                connection.sendall(b"X-%d: 1\r\n" % at)
            except OSError:
                break
            time.sleep(0.05)
        assert at < 99 and b"408" in rest(connection)


@pytest.mark.slow
def test_a_connection_that_asks_nothing_more_is_closed(server):
    with raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert rest(connection).startswith(b"HTTP/1.1 200")  # ends: the server closed


@pytest.mark.slow
def test_more_connections_than_may_be_open_are_told_so(server):
    with ExitStack() as stack:
        many = [stack.enter_context(raw(server, b"")) for _ in range(20)]
        ends = [rest(connection) for connection in many]
    full = [end for end in ends if b"503 Service Unavailable" in end and b"too_many_connections" in end]
    assert 1 <= len(full) <= 8, ends  # fewer where the first were closed before the last came
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_what_is_no_http_is_answered_in_the_same_form(server):
    for data in (b"\x16\x03\x01 not http\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"):
        with raw(server, data) as connection:
            head, _, body = rest(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and "not HTTP" in json.loads(body)["error"]["message"]


# -- who ------------------------------------------------------------------------------------------------------------


def test_a_server_on_this_machine_answers_only_under_its_own_names(server):
    port = server.url.rpartition(":")[2]
    for host in ("localhost", f"127.0.0.1:{port}", "[::1]:80", "MODEL.example"):
        assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example"):
        answer = httpx.get(f"{server.url}/v1/models", headers={"host": host})
        assert answer.status_code == 403 and said(answer)["code"] == "host_not_allowed"


def test_only_pages_that_were_named_may_read_answers(server):
    def asked(origin):
        return httpx.options(
            f"{server.url}/v1/completions", headers={"origin": origin, "access-control-request-method": "POST"}
        ).headers.get("access-control-allow-origin")

    assert asked("https://page.example") == "https://page.example" and asked("https://evil.example") is None
    simple = httpx.post(
        f"{server.url}/v1/completions",
        headers={"content-type": "text/plain"},
        content=json.dumps({"model": "tiny", "prompt": "a"}),
    )  # what a page may send unasked
    assert simple.status_code == 415 and "must be `application/json`" in said(simple)["message"]


@pytest.mark.slow
def test_connections_that_never_begin_tls_are_few_and_closed_in_time(keyed, certificate):
    port = int(keyed.url.rpartition(":")[2])
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(120)]
        started = time.monotonic()
        assert all(rest(connection) == b"" for connection in silent)
        assert time.monotonic() - started < 15, "asyncio itself waits for a minute"
        held = len(list(Path(f"/proc/{keyed.process.pid}/fd").iterdir()))
    assert held < 100
    trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(certificate[0])))
    assert trusting.get(f"https://127.0.0.1:{port}/health").status_code == 200


def test_with_keys_only_who_has_one_is_answered(keyed, certificate):
    trusting = httpx.Client(
        verify=ssl.create_default_context(cafile=str(certificate[0])),
        base_url=keyed.url.replace("0.0.0.0", "127.0.0.1"),
    )
    assert keyed.url.startswith("https://") and trusting.get("/health").status_code == 200
    for header in (
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEYS[0]}"},
        {"authorization": f"Bearer {KEYS[0]}x"},
        {"authorization": f"Bearer {KEYS[0][:-1]}"},
    ):
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            answer = trusting.get(path, headers=header)
            assert answer.status_code == 401 and said(answer)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in KEYS:
        client = openai.OpenAI(base_url=f"{trusting.base_url}/v1", api_key=key, http_client=trusting, max_retries=0)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2
    assert until(lambda: [line["key"] for line in keyed.lines() if line["status"] == 200][-2:] == [0, 1])
    assert not any(key in keyed.said() for key in KEYS)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "0.0.0.0 can be reached from other machines, and there is no --api-key"),
        (("--api-key", "short"), "key 0 is no key: it has 5 characters"),
        (("--api-key", "a key with spaces in it"), "no space"),
        (("--tls-cert", "absent.pem"), "--tls-cert needs --tls-key beside it"),
        (("--tls-cert", "absent.pem", "--tls-key", "absent.pem"), "no such file"),
        (("--access-log", "nowhere/log"), "`nowhere/log` can't be written"),
    ],
)
def test_a_server_that_would_be_open_or_could_not_start_does_not(effc, flags, words):  # noqa: F811
    run = effc("serve", "zoo:tiny-llama", "--port", "0", *flags)
    assert run.code == 2 and words in run.err


@pytest.mark.slow
def test_insecure_serves_other_machines_without_a_key_and_says_so():
    with serving("zoo:tiny-llama", "--host", "0.0.0.0", "--insecure", "--access-log", "none") as served:
        assert "everybody who reaches 0.0.0.0 may use the model" in served.said()
        answer = httpx.get(served.url.replace("0.0.0.0", "127.0.0.1") + "/v1/models", headers={"host": "any.example"})
        assert answer.status_code == 200 and served.lines() == []


# -- wrong numbers, and what is written down ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"model": "tiny", "prompt": "\\ud800"}', "hex escape"),
        ('{"model": "\\udfff", "prompt": "a"}', "is not JSON"),
        ('{"model": "tiny", "prompt": "a", "stop": ["\\ud800a"]}', "hex escape"),
        ('{"model": "tiny", "prompt": "a", "top_p": 1e-300}', "`top_p`: 1e-300 is too small"),
        ('{"model": "tiny", "prompt": "a", "temperature": 1e-300}', "`temperature`: 1e-300 is too small: give 0"),
        ('{"model": "tiny", "prompt": "a", "repetition_penalty": 1e-300}', "`repetition_penalty`: 1e-300 is too small"),
        ('{"model": "tiny", "prompt": "a", "repetition_penalty": 1e300}', "`repetition_penalty`"),
        ('{"model": "tiny", "prompt": "a", "temperature": NaN}', "is not JSON"),
        ('{"model": "tiny", "prompt": "a", "temperature": 1e999}', "temperature"),
        ('{"model": "tiny", "prompt": "a", "seed": 1' + "0" * 400 + "}", "seed"),
        ('{"model": "tiny", "prompt": "a", "max_tokens": 1' + "0" * 30 + "}", "context is 512"),
        ('{"model": "tiny", "prompt": ' + "[" * 5000 + "]" * 5000 + "}", "is not JSON"),
        ('{"model": "tiny", "prompt": "a", "metadata": ' + '{"a":' * 5000 + "1" + "}" * 5001, "is not JSON"),
        ("[]", "no JSON object"),
        ("", "is not JSON"),
        ('{"model": "tiny"', "is not JSON"),
    ],
)
def test_numbers_and_characters_that_mean_nothing_are_400(server, body, words):
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and words in said(answer)["message"], answer.text
    assert said(answer)["type"] == "invalid_request_error" and answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 1e-4},
        {"top_p": 2.0**-126},
        {"top_p": 1e-30, "temperature": 2},
        {"repetition_penalty": 1e-2, "temperature": 1e-4},
        {"repetition_penalty": 100},
    ],
)
def test_the_smallest_and_largest_settings_that_are_taken_answer(server, setting):
    found = server.complete(max_tokens=4, **{"temperature": 1, **setting})
    assert found.usage.completion_tokens >= 1


def test_bytes_that_are_no_utf8_are_400(server):
    answer = httpx.post(
        f"{server.url}/v1/completions",
        content=b'{"model": "tiny", "prompt": "\xff\xfe"}',
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400 and "is not JSON" in said(answer)["message"]


def test_a_request_has_a_line_with_its_id_and_not_a_word_of_it(server):
    asked = httpx.post(
        f"{server.url}/v1/completions",
        headers={"x-request-id": "mine-1"},
        json={"model": "tiny", "prompt": SECRET, "max_tokens": 3, "user": SECRET},
    )
    wrong = httpx.post(
        f"{server.url}/v1/completions?{SECRET}",
        headers={"x-request-id": f"{SECRET} \\"},
        json={"model": SECRET, "prompt": SECRET},
    )
    assert asked.status_code == 200 and asked.headers["x-request-id"] == "mine-1" and wrong.status_code == 404
    own = wrong.headers["x-request-id"]
    deadline = time.monotonic() + 20
    while len(found := [line for line in server.lines() if line["request"] in ("mine-1", own)]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [line["status"] for line in found] == [200, 404]
    assert found[0]["path"] == "/v1/completions" and found[0]["bytes_in"] > 0 and found[0]["client"] == "127.0.0.1"
    assert SECRET not in server.said()
    counted = server.metric("effc_http_responses_total", path="/v1/completions", status="404")
    assert counted >= 1


def test_readers_that_leave_make_no_noise(server):
    def leave(_):
        stream = server.complete(max_tokens=300, stream=True)
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, range(12)))
    deadline = time.monotonic() + 60
    while server.metric("effc_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("effc_requests_running") == 0
    assert all(line.startswith("{") for line in server.said().splitlines()), server.said()
