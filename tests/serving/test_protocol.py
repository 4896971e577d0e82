"""OpenAI's protocol, over a decoder without a model: answers, streams, usage, log-probabilities, refusals."""

import json

import httpx
import pytest
from serving_stub import serve
from stub_run import TOKENIZER

from gpt_jax.data.tokenizer import encode

ANSWER = "an answer, näive"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "a question"}]}


@pytest.fixture(scope="module")
def stub():
    with serve(lambda prompt, options: ANSWER) as server:
        yield server


@pytest.fixture(scope="module")
def echo():
    """Answers with what the model was given."""
    with serve(lambda prompt, options: f"{prompt}{options}") as server:
        yield server


def events(response: httpx.Response) -> list:
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_an_answer_in_one_piece(stub):
    response = stub.client.post("/v1/chat/completions", json=ASK)
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    read, drawn = len(encode(TOKENIZER, "a question")) + 2, len(encode(TOKENIZER, ANSWER))
    assert body["usage"] == {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


def test_a_stream_has_the_role_first_the_reason_last_and_usage_without_choices(stub):
    with_usage = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(stub.client.post("/v1/chat/completions", json=with_usage))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = [chunk["choices"][0] for chunk in chunks[1:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in said) == ANSWER
    assert [choice["finish_reason"] for choice in said] == [None] * (len(said) - 1) + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(encode(TOKENIZER, ANSWER))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    plain = events(stub.client.post("/v1/chat/completions", json={**ASK, "stream": True}))
    assert all("usage" not in chunk for chunk in plain)
    assert plain[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_limit_is_a_reason_of_its_own(stub):
    for name in ("max_tokens", "max_completion_tokens"):
        body = stub.client.post("/v1/chat/completions", json={**ASK, name: 2}).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 2


def test_stop_strings_end_an_answer_and_are_no_part_of_it(stub):
    for stop in (", n", [", n", "xyz"]):
        body = stub.client.post("/v1/chat/completions", json={**ASK, "stop": stop}).json()
        assert (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]) == ("an answer", "stop")


def test_several_choices_have_seeds_of_their_own_and_the_first_that_of_the_request(echo):
    body = echo.client.post("/v1/chat/completions", json={**ASK, "n": 3, "seed": 7}).json()
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert "seed=7," in texts[0]
    assert len(set(texts)) == 3
    chunks = events(echo.client.post("/v1/chat/completions", json={**ASK, "n": 3, "seed": 7, "stream": True}))
    streamed = ["", "", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_without_a_seed_each_answer_has_another(echo):
    texts = {
        echo.client.post("/v1/chat/completions", json=ASK).json()["choices"][0]["message"]["content"] for _ in "12"
    }
    assert len(texts) == 2


def test_options_reach_the_decoder_and_the_run_gives_the_others(echo):
    asked = {"top_p": 0.25, "top_k": 3, "min_p": 0.5, "repetition_penalty": 1.5, "presence_penalty": -1, "seed": -1}
    body = echo.client.post("/v1/chat/completions", json={**ASK, **asked}).json()
    text = body["choices"][0]["message"]["content"]
    for name, value in {**asked, "temperature": 0.5, "seed": 2**32 - 1}.items():
        assert f"{name}={float(value) if name == 'presence_penalty' else value}" in text


def test_roles_and_parts_become_the_prompt_of_training(echo):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three", "name": "x"},
        {"role": "user", "content": [{"type": "text", "text": "four"}, {"type": "text", "text": "five"}]},
    ]
    body = echo.client.post("/v1/chat/completions", json={"messages": messages}).json()
    expected = "<|user|>Be brief.\n\nBe kind.\n\none\n\ntwo<|assistant|>three<|user|>four\nfive<|assistant|>"
    assert body["choices"][0]["message"]["content"].startswith(expected)
    opened = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "u"},
    ]
    body = echo.client.post("/v1/chat/completions", json={"messages": opened}).json()
    assert body["choices"][0]["message"]["content"].startswith("<|user|>s<|assistant|>a<|user|>u<|assistant|>")


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_answer_that_was_empty_ends_no_conversation(empty, echo):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": empty},
        {"role": "user", "content": "two"},
    ]
    body = echo.client.post("/v1/chat/completions", json={"messages": messages}).json()
    assert body["choices"][0]["message"]["content"].startswith("<|user|>one\n\ntwo<|assistant|>")
    first = echo.client.post("/v1/chat/completions", json={"messages": messages[1:]})
    assert (first.status_code, first.json()["error"]["message"]) == (400, "messages[0].content is empty")


def test_what_does_not_fit_into_the_block_is_told(echo):
    messages = [
        {"role": role, "content": f"{role} {i} " + "xyz" * 20} for i in range(6) for role in ("user", "assistant")
    ]
    body = echo.client.post("/v1/chat/completions", json={"messages": [*messages, ASK["messages"][0]]}).json()
    assert body["left_out"] > 0
    assert body["left_out"] % 2 == 0
    kept = messages[body["left_out"]]["content"]
    assert body["choices"][0]["message"]["content"].startswith(f"<|user|>{kept}<|assistant|>")


def test_log_probabilities_of_a_chat(stub):
    body = stub.client.post("/v1/chat/completions", json={**ASK, "logprobs": True, "top_logprobs": 3}).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == ANSWER
    assert content[0]["logprob"] == pytest.approx(-0.6931, abs=1e-4)
    assert [other["logprob"] for other in content[0]["top_logprobs"]] == [
        *(pytest.approx(-0.6931, abs=1e-4), pytest.approx(-1.3863, abs=1e-4), -9999.0)
    ]
    chunks = events(stub.client.post("/v1/chat/completions", json={**ASK, "logprobs": True, "stream": True}))
    streamed = [t for c in chunks if c["choices"][0]["logprobs"] for t in c["choices"][0]["logprobs"]["content"]]
    assert [t["bytes"] for t in streamed] == [t["bytes"] for t in content]
    assert all(t["top_logprobs"] == [] for t in streamed)


def test_completions_of_texts_and_tokens(echo):
    body = echo.client.post("/v1/completions", json={"prompt": "a question", "max_tokens": 9}).json()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"].startswith("a question")
    ids = encode(TOKENIZER, "a question")
    for prompt, count in ((ids, 1), ([ids, ids], 2), (["a question", "an answer"], 2)):
        body = echo.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 300, "n": 2, "seed": 1}).json()
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * count))
        assert body["choices"][0]["text"].startswith("a question")
        assert "seed=1," in body["choices"][0]["text"]
    assert body["choices"][2]["text"].startswith("an answer")
    assert echo.client.post("/v1/completions", json={"prompt": ""}).json()["choices"][0]["text"].startswith("<|end_of")


def test_more_texts_than_the_server_ever_takes_are_refused_for_good(echo):
    response = echo.client.post("/v1/completions", json={"prompt": ["a"] * 64, "n": 2})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        "128 texts are asked for at once, and this server takes 104: ask for fewer"
    )


def test_completions_stream_and_tell_log_probabilities(stub):
    asked = {"prompt": "x", "max_tokens": 50, "logprobs": 2, "stream": True}
    chunks = events(stub.client.post("/v1/completions", json=asked))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sum(len(t["tokens"]) for t in told) == len(encode(TOKENIZER, ANSWER))
    whole = stub.client.post("/v1/completions", json={**asked, "stream": False}).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == [token for t in told for token in t["tokens"]]
    assert whole["text_offset"][:2] == [0, len(whole["tokens"][0])]
    assert len(whole["top_logprobs"][0]) == 2


def test_models(stub):
    [model] = stub.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert stub.client.get("/v1/models/tiny").json() == model
    assert stub.client.get("/v1/models/gpt-4").status_code == 404


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "there is no model 'gpt-4' here, only 'tiny'"),
        ({"messages": None}, 400, "messages: input should be a valid list"),
        ({"messages": []}, 400, "messages: list should have at least 1 item"),
        ({"messages": "hi"}, 400, "messages: input should be a valid list"),
        ({"messages": [3]}, 400, "messages[0]: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role: input should be 'system', 'dev"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content is empty"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, USER]},
            400,
            "messages[1].tool_calls is not supported: the model calls no tools",
        ),
        (
            {"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}, USER]},
            400,
            "function_call is not",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages[0].content is empty"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content: list should have at least 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages[0].content[0].type: input should be 'text'",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}, USER]}, 400, "messages[0]: the user must speak before"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, 400, "the last message must be the user's"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, 400, "messages[1]: a system message can only come"),
        ({"messages": [{"role": "user", "content": "z" * 500}]}, 400, "the message has 502 tokens with their markers"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half of a surrogate pair"),
        ({"temperature": -0.1}, 400, "temperature: input should be greater than or equal to 0"),
        ({"temperature": "hot"}, 400, "temperature: input should be a valid number"),
        ({"temperature": 1e300}, 400, "temperature must be a number in [0, inf)"),
        ({"top_p": 0}, 400, "top_p: input should be greater than 0"),
        ({"top_p": 1.5}, 400, "top_p: input should be less than or equal to 1"),
        ({"top_k": -1}, 400, "top_k: input should be greater than or equal to 0"),
        ({"top_k": 1.5}, 400, "top_k: input should be a valid integer"),
        ({"min_p": 2}, 400, "min_p: input should be less than or equal to 1"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty: input should be greater than 0"),
        ({"presence_penalty": 3}, 400, "presence_penalty: input should be less than or equal to 2"),
        ({"frequency_penalty": True}, 400, "frequency_penalty: input should be a valid number"),
        ({"max_tokens": 0}, 400, "max_tokens: input should be greater than or equal to 1"),
        ({"max_completion_tokens": 2**31}, 400, "max_completion_tokens: input should be less than"),
        ({"n": 0}, 400, "n: input should be greater than or equal to 1"),
        ({"n": 17}, 400, "n: input should be less than or equal to 16"),
        ({"seed": 2**63}, 400, "seed: input should be less than"),
        ({"seed": 1.5}, 400, "seed: input should be a valid integer"),
        ({"stop": ""}, 400, "stop: string should have at least 1 character"),
        ({"stop": ["a"] * 17}, 400, "stop: list should have at most 16 items"),
        ({"stop": 5}, 400, "stop: input should be a valid"),
        ({"stream": "yes"}, 400, "stream: input should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options needs stream=true"),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs: input should be less than or equal to 20"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"tool_choice": "required"}, 400, "tool_choice is not supported"),
        ({"functions": [{}]}, 400, "functions is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
        ({"modalities": ["text", "audio"]}, 400, "modalities is not supported"),
    ],
)
def test_what_is_wrong_is_refused_in_the_shape_of_openai(change, status, message, stub):
    # ascii JSON, as httpx would not send half of a surrogate pair
    response = stub.client.post(
        "/v1/chat/completions", content=json.dumps({**ASK, **change}), headers={"content-type": "application/json"}
    )
    assert (response.status_code, message) == (status, message if message in response.text else response.text)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "whatever": [1]},
        {
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "logit_bias": {},
            "parallel_tool_calls": True,
        },
        {"n": None, "stop": None, "temperature": None, "max_tokens": None, "stream": None, "logprobs": None},
        {"temperature": 1, "top_p": 1},
    ],
)
def test_what_changes_nothing_is_ignored(harmless, stub):
    assert stub.client.post("/v1/chat/completions", json={**ASK, **harmless}).status_code == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt: "),
        ({"prompt": []}, "prompt: "),
        ({"prompt": [[]]}, "prompt[0]: list should have at least 1 item"),
        ({"prompt": [-1]}, "prompt[0]: input should be greater than or equal to 0"),
        ({"prompt": [280]}, "prompt: token 280 is none of the 280 that the model knows"),
        ({"prompt": [5] * 400}, "the prompt has 400 tokens, and the model sees 400"),
        ({"prompt": "z" * 400}, "the prompt has 400 tokens, and the model sees 400"),
        ({"prompt": ["x"] * 65}, "prompt: list should have at most 64 items"),
        ({"best_of": 2}, "best_of is not supported: give n"),
        ({"echo": True}, "echo is not supported"),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"logprobs": 21}, "logprobs: input should be less than or equal to 20"),
    ],
)
def test_what_is_wrong_with_a_completion(change, message, stub):
    response = stub.client.post("/v1/completions", json={"prompt": "x", **change})
    assert (response.status_code, message) == (400, message if message in response.text else response.text)
