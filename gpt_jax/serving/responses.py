"""The answers of the server, as OpenAI's clients read them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict  # Pydantic takes no other before Python 3.12

from gpt_jax.inference.engine import DrawnToken
from gpt_jax.inference.sampling import finite

Bytes = Sequence[bytes]  # of each token of the vocabulary


class Usage(TypedDict):
    """Tokens of the prompt, of all answers, and both."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(TypedDict):
    """A token, its log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(TypedDict):
    role: str
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletion(TypedDict):
    """An answer to POST /v1/chat/completions. left_out: how many of the oldest messages the model did not see."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    left_out: int


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class TextCompletion(TypedDict):
    """An answer to POST /v1/completions."""

    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(TypedDict):
    """The run. description: which checkpoint. block_size: tokens that it sees at once. defaults: how it draws."""

    id: str
    object: str
    created: int
    owned_by: str
    description: str
    block_size: int
    defaults: dict[str, Any]


class ModelList(TypedDict):
    object: str
    data: list[Model]


class ErrorBody(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """Any refusal or failure."""

    error: ErrorBody


class Health(TypedDict):
    """status: ok, or the line of a device that failed."""

    status: str
    model: str
    waiting: int
    running: int


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> Error:
    """The body of a failure with an HTTP status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_logprobs(drawn: Iterable[DrawnToken], vocabulary: Bytes) -> ChatLogprobs:
    """The log-probabilities of tokens, as /v1/chat/completions tells them."""

    def one(token: int, logprob: float) -> TopLogprob:
        spelled = vocabulary[token]
        return {"token": _text(spelled), "logprob": finite(logprob), "bytes": list(spelled)}

    content: list[TokenLogprob] = [
        {**one(each.token, each.logprob), "top_logprobs": [one(*other) for other in each.alternatives]}
        for each in drawn
    ]
    return {"content": content, "refusal": None}


def text_logprobs(drawn: Sequence[DrawnToken], vocabulary: Bytes, offset: int, alternatives: int) -> TextLogprobs:
    """The same, as /v1/completions tells them; offset: of the first token's characters in the text."""
    texts = [_text(vocabulary[each.token]) for each in drawn]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [finite(each.logprob) for each in drawn],
        "top_logprobs": [_by_text(each.alternatives, vocabulary) for each in drawn] if alternatives else None,
        "text_offset": offsets,
    }


def _by_text(alternatives: Iterable[tuple[int, float]], vocabulary: Bytes) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in alternatives:
        found.setdefault(_text(vocabulary[token]), finite(logprob))  # parts of characters all look alike
    return found


def _text(spelled: bytes) -> str:
    return spelled.decode("utf-8", "replace")


def chat_choice(index: int, content: str, logprobs: ChatLogprobs | None, reason: str | None) -> ChatChoice:
    message: ChatMessage = {"role": "assistant", "content": content, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def text_choice(index: int, text: str, logprobs: TextLogprobs | None, reason: str | None) -> TextChoice:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def delta_choice(
    index: int, delta: Mapping[str, Any], logprobs: ChatLogprobs | None, reason: str | None
) -> dict[str, Any]:
    """A choice of a chunk of a streamed chat answer."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
