"""A server among clients that are slow, gone, wrong or many: limits, keys, places, and what it tells of itself."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time

import httpx
import pytest
from serving_stub import Stub, serve
from waiting import PATIENCE, wait_for

from gpt_jax.serving.limits import _DROPPED, Limits
from gpt_jax.serving.sending import WholeAnswer
from vk_kernels.errors import DeviceLostError

ASK = {"messages": [{"role": "user", "content": "a question"}]}
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def stub():
    with serve(lambda prompt, options: "an answer", Limits(body=5000, body_seconds=10 * PATIENCE)) as server:
        yield server


def send(stub: Stub, *parts: bytes, path: str = CHAT) -> socket.socket:
    """A connection over which a request's bytes were sent as they are."""
    host, port = stub.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    connection.sendall(b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % path.encode())
    for part in parts:
        with contextlib.suppress(ConnectionError):  # it may have been answered before all of it was sent
            connection.sendall(part)
    return connection


def ask_raw(stub: Stub, **more) -> socket.socket:
    body = json.dumps({**ASK, **more}).encode()
    return send(stub, b"content-length: %d\r\n\r\n" % len(body), body)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{}", {"content-type": "text/plain"}, 415, "content-type must be application/json, found 'text/plain'"),
        (b"{}", {}, 415, "content-type must be application/json, found none"),
        (b"", JSON, 400, "the body is no JSON"),
        (b"{", JSON, 400, "the body is no JSON"),
        (b"[]", JSON, 400, "the body must be a JSON object"),
        (b"null", JSON, 400, "the body must be a JSON object"),
        (b'{"messages": NaN}', JSON, 400, "NaN is no number of JSON"),
        (b'{"seed": ' + b"9" * 4400 + b"}", JSON, 400, "the body is no JSON"),
        (b'"\xff\xfe"', JSON, 400, "the body is no JSON"),
        (b"[" * 4000, JSON, 400, "the body is n"),  # nested too deeply, or no JSON: how deep Python reads differs
        (b"x" * 5001, JSON, 413, "the body is longer than 5,000 bytes"),
    ],
)
def test_bodies_that_are_none(body, headers, status, message, stub):
    response = stub.client.post(CHAT, content=body, headers=headers)
    assert (response.status_code, message) == (status, message if message in response.text else response.text)
    assert response.json()["error"]["message"]


def test_a_body_that_never_ends_costs_no_more_than_some_times_its_limit(stub):
    pieces = (b"3e8\r\n" + b"x" * 1000 + b"\r\n") * (_DROPPED * 5 + 1)
    with send(stub, b"transfer-encoding: chunked\r\n\r\n", pieces) as connection:
        assert b" 413 " in connection.recv(1000)


def test_a_body_that_does_not_come_is_not_waited_for():
    with serve(lambda prompt, options: "an answer", Limits(body_seconds=0.2)) as stub:
        with send(stub, b"content-length: 100\r\n\r\n{") as connection:
            assert b" 408 " in connection.recv(1000)
        assert stub.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", CHAT, 405), ("GET", "/v1/nothing", 404), ("PUT", "/", 405)]
)
def test_paths_and_methods_that_there_are_none_of(method, path, status, stub):
    response = stub.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(f"{method} {path}: ")


def test_bytes_that_are_no_http_cost_nobody_anything(stub):
    for nonsense in (
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"POST " + b"/" * 90000 + b" HTTP/1.1\r\n",
    ):
        host, port = stub.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            with contextlib.suppress(ConnectionError):  # it may have answered before all of it was sent
                connection.sendall(nonsense)
            assert b" 400 " in connection.recv(1000)
    assert stub.client.get("/health").json()["status"] == "ok"


def test_a_key_is_asked_for_where_one_is_set():
    with serve(lambda prompt, options: "yes", app={"api_key": "sésame"}) as stub:
        for wrong in (
            {},
            {"authorization": "Bearer x"},
            {"authorization": "Basic s\xe9same"},
            {"authorization": "Bearer"},
        ):
            for method, path in (
                ("POST", CHAT),
                ("POST", "/v1/completions"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
            ):
                response = stub.client.request(method, path, headers={k: v.encode() for k, v in wrong.items()})
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        good = {"authorization": "Bearer sésame".encode()}
        assert stub.client.post(CHAT, json=ASK, headers=good).status_code == 200
        assert stub.client.get("/health").status_code == stub.client.get("/").status_code == 200


def test_pages_of_other_origins_may_come_only_where_they_are_named():
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    for origins, allowed in (((), None), (("https://a.example",), "https://a.example"), (("https://b.example",), None)):
        with serve(lambda prompt, options: "yes", app={"origins": origins}) as stub:
            response = stub.client.options(CHAT, headers=asked)
            assert response.headers.get("access-control-allow-origin") == allowed
            response = stub.client.post(CHAT, json=ASK, headers=asked)
            assert response.headers.get("access-control-allow-origin") == allowed


def test_a_name_that_points_here_from_elsewhere_is_refused():
    with serve(lambda prompt, options: "yes", app={"hosts": ("127.0.0.1", "localhost", "::1")}) as stub:
        for host in ("evil.example", "localhost.evil.example:8000", "[::1", ""):
            found = stub.client.get("/health", headers={"host": host})
            assert (found.status_code, found.json()["error"]["code"]) == (400, "unknown_host")
        for host in ("localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:8000"):
            assert stub.client.get("/health", headers={"host": host}).status_code == 200


def test_requests_share_the_decoding_batch():
    gate = threading.Event()
    with serve(lambda prompt, options: prompt, pace=lambda number: gate.wait(PATIENCE), slots=8) as stub:
        answers = [None] * 8

        def ask(i):
            asked = {"messages": [{"role": "user", "content": f"text {i}"}]}
            answers[i] = httpx.post(stub.url + CHAT, json=asked, timeout=PATIENCE).json()

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        wait_for(lambda: stub.engine.running + stub.engine.waiting == 8)
        gate.set()
        for thread in threads:
            thread.join()
        assert stub.decoder.most_at_once == 8
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        assert texts == [f"<|user|>text {i}<|assistant|>" for i in range(8)]


def test_too_many_that_wait_are_told_to_come_again():
    gate = threading.Event()
    with serve(lambda prompt, options: "yes", pace=lambda number: gate.wait(PATIENCE), slots=1, max_waiting=1) as stub:
        held = [ask_raw(stub)]
        wait_for(lambda: stub.engine.running == 1)
        held.append(ask_raw(stub))
        wait_for(lambda: stub.engine.waiting == 1)
        for asked in (ASK, {**ASK, "stream": True}, {**ASK, "n": 2}):
            response = stub.client.post(CHAT, json=asked)
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert response.json()["error"]["code"] == "queue_full"
        assert stub.engine.waiting == 1
        gate.set()
        for connection in held:
            assert b" 200 " in connection.recv(1000)
            connection.close()


def test_too_many_open_requests_are_refused_and_the_rest_goes_on():
    gate = threading.Event()
    served = serve(lambda prompt, options: "yes", Limits(clients=1), pace=lambda number: gate.wait(PATIENCE))
    with served as stub, ask_raw(stub) as connection:
        wait_for(lambda: stub.engine.running == 1)
        assert stub.client.post(CHAT, json=ASK).json()["error"]["code"] == "too_many_requests"
        assert stub.client.get("/health").status_code == 200
        gate.set()
        assert b" 200 " in connection.recv(1000)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream):
    pace = threading.Semaphore(1)
    long = lambda prompt, options: "long " * 60  # noqa: E731
    with serve(long, pace=lambda number: pace.acquire(timeout=PATIENCE), slots=1) as stub:
        connection = ask_raw(stub, stream=stream)
        wait_for(lambda: stub.engine.running == 1)
        waiting = ask_raw(stub, stream=stream)
        wait_for(lambda: stub.engine.waiting == 1)
        waiting.close()
        wait_for(lambda: stub.engine.waiting == 0)
        connection.close()
        wait_for(lambda: all(each.cancelled for each in stub.engine._running.values()))
        pace.release(1)
        wait_for(lambda: stub.engine.running == 0)
        assert stub.decoder.chunks <= 4
        pace.release(1000)
        assert stub.client.post(CHAT, json=ASK).status_code == 200


def test_a_reader_that_does_not_read_holds_nobody_up():
    with serve(lambda prompt, options: "word " * 70, slots=2) as stub:
        idle = [ask_raw(stub, stream=True, logprobs=True, top_logprobs=20) for _ in range(4)]
        for _ in range(3):
            assert stub.client.post(CHAT, json=ASK).status_code == 200
        wait_for(lambda: stub.engine.running == stub.engine.waiting == 0)
        for connection in idle:
            received = b""
            while b"[DONE]" not in received:
                received += connection.recv(100_000)
            connection.close()


@pytest.mark.parametrize("is_read", [True, False])
def test_an_answer_that_nobody_reads_is_given_up_in_time(is_read):
    answer, sent = {"text": "x" * 300_000}, []

    async def send(message):
        sent.append(message)
        if not is_read and len(sent) == 3:
            await asyncio.sleep(PATIENCE)

    async def answered() -> None:
        until = asyncio.get_running_loop().time() + (PATIENCE if is_read else 0.05)
        await asyncio.wait_for(WholeAnswer(answer, until)({"type": "http"}, None, send), PATIENCE / 2)

    asyncio.run(answered())
    start, *parts = sent
    body = b"".join(part["body"] for part in parts)
    length = int(dict(start["headers"])[b"content-length"])
    assert max(len(part["body"]) for part in parts) < 100_000
    assert (len(body) == length, parts[-1]["more_body"]) == (is_read, not is_read)
    assert not is_read or json.loads(body) == answer


def test_what_is_not_answered_in_time_is_told():
    gate = threading.Event()
    with serve(lambda prompt, options: "yes", Limits(seconds=0.2), pace=lambda number: gate.wait(PATIENCE)) as stub:
        response = stub.client.post(CHAT, json=ASK)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        gate.set()
        wait_for(lambda: stub.engine.running == 0)


def test_a_device_that_fails_is_told_to_those_who_wait_and_in_health():
    def fail(number):
        if number == 2:
            raise DeviceLostError("the device was lost")

    with serve(lambda prompt, options: "long " * 30, pace=fail) as stub:
        response = stub.client.post(CHAT, json={**ASK, "stream": True})
        assert response.status_code == 200
        last = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
        assert last["error"]["message"] == "the device was lost"
        assert "[DONE]" not in response.text
        response = stub.client.post(CHAT, json=ASK)
        assert (response.status_code, response.json()["error"]["message"]) == (503, "the device was lost")
        response = stub.client.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "the device was lost")
        assert "gpt_jax_engine_failed 1.0" in stub.client.get("/metrics").text


def test_metrics_count_what_was_done(stub):
    def value(name: str) -> float:
        found = re.search(rf"^gpt_jax_{re.escape(name)} (\S+)$", stub.client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    answered = f'http_requests_total{{path="{CHAT}",status="200"}}'
    wait_for(lambda: value("http_requests_open") == 1.0)  # no other test's is being counted
    before = {name: value(name) for name in (answered, 'tokens_total{kind="completion"}', "first_token_seconds_count")}
    body = stub.client.post(CHAT, json=ASK).json()
    for _ in range(3):
        stub.client.get(f"/nothing/{time.time()}")
    wait_for(lambda: value("http_requests_open") == 1.0)
    assert value(answered) == before[answered] + 1
    drawn = body["usage"]["completion_tokens"]
    assert value('tokens_total{kind="completion"}') == before['tokens_total{kind="completion"}'] + drawn
    assert value("first_token_seconds_count") == before["first_token_seconds_count"] + 1
    assert value('http_requests_total{path="other",status="404"}') >= 3
    assert "/nothing" not in stub.client.get("/metrics").text
    assert stub.client.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_the_schema_names_every_path_and_field(stub):
    schema = stub.client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        *(CHAT, "/v1/completions", "/v1/models", "/v1/models/{model}", "/health", "/metrics")
    }
    chat = schema["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    assert chat["properties"]["top_p"]["anyOf"][0] == {"exclusiveMinimum": 0, "maximum": 1, "type": "number"}
    events = schema["paths"][CHAT]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    assert (events["type"], events["required"]) == ("object", ["data"])  # as schemathesis checks each event
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)))
    assert references <= set(schema["components"]["schemas"])


def test_the_page_reaches_nothing_but_its_server(stub):
    response = stub.client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", response.text.replace('href="data:,"', ""))
