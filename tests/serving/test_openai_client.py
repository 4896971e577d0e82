"""OpenAI's own Python client against the server: answers, streams, errors, cancellation."""

import threading

import pytest
from serving_stub import serve
from waiting import PATIENCE, wait_for

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "a question"}]


@pytest.fixture(scope="module")
def openai():
    """The client, imported here: it takes seconds, and every selection of tests imports this file."""
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def stub():
    with serve(lambda prompt, options: "an answer") as server:
        yield server


def client_of(stub, **options):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{stub.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE, **options)


def test_answers_streams_and_usage(stub):
    with client_of(stub) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("an answer", "stop")
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "an answer"
        assert chunks[-1].usage == whole.usage
        with client.chat.completions.stream(model="tiny", messages=MESSAGES) as events:
            assert events.get_final_completion().choices[0].message.content == "an answer"
        text = client.completions.create(model="tiny", prompt="x", max_tokens=50)
        assert text.choices[0].text == "an answer"


def test_errors_are_those_of_its_own_classes(openai, stub):
    with client_of(stub) as client:
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here"):
            client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        with pytest.raises(openai.BadRequestError, match="tools is not supported") as raised:
            client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[tool])
        assert raised.value.code == "unsupported_parameter"
        assert raised.value.param == "tools"
    refused = pytest.raises(openai.AuthenticationError, match="the API key is wrong")
    with serve(lambda prompt, options: "x", app={"api_key": "right"}) as locked, client_of(locked) as client, refused:
        client.models.list()


def test_a_failure_on_the_way_is_raised(openai):
    def fail(number):
        if number == 2:
            raise MemoryError

    with serve(lambda prompt, options: "long " * 30, pace=fail) as stub, client_of(stub) as client:
        with pytest.raises(openai.APIError, match="out of memory"):
            list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            client.chat.completions.create(model="tiny", messages=MESSAGES)


def test_a_stream_that_is_closed_frees_its_place():
    pace = threading.Semaphore(3)
    long = lambda prompt, options: "long " * 60  # noqa: E731
    with serve(long, pace=lambda number: pace.acquire(timeout=PATIENCE)) as stub, client_of(stub) as client:
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        next(stream)
        next(stream)
        stream.close()
        wait_for(lambda: all(each.cancelled for each in stub.engine._running.values()))
        pace.release()
        wait_for(lambda: stub.engine.running == 0)
        assert stub.decoder.chunks <= 4
