"""The requests that the server takes, with their checks; the published schema is made of the same classes.

A field that is not known is ignored, as clients send many that change nothing here. One that asks for what the server
cannot do is refused, unless its value asks for nothing.
"""

import math
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt_jax.config import text_problem
from gpt_jax.data.dialogue import Turn
from gpt_jax.errors import UserError
from gpt_jax.inference.sampling import MOST_ALTERNATIVES, OPTION_FIELDS, SamplingOptions

MOST_CHOICES = 16  # texts of one request
MOST_STOPS = 16
MOST_PROMPTS = 64

# What a field may be that asks for nothing; any other value of it is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, [], ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "echo": (None, False),
}


class RequestError(Exception):
    """A request that is refused. param: the field that is wrong, if it is one. code: as OpenAI's errors have it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def _option(name: str) -> Any:
    """A sampling option, whose range and meaning the trainer's config has; null or absent: the run's own."""
    field = OPTION_FIELDS[name]
    ends: dict[str, Any] = {"gt" if field.open_low else "ge": field.low}
    if math.isfinite(field.high):
        ends["le"] = field.high
    return Field(default=None, description=field.meaning, **ends)


class _Shape(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class TextPart(_Shape):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Shape):
    """A turn, or a system text, which comes first. An assistant's may have no content, as clients send what it said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return (self.content or "").strip()
        return "\n".join(part.text for part in self.content).strip()


class StreamOptions(_Shape):
    """include_usage: whether a last chunk without choices tells how many tokens there were."""

    include_usage: bool | None = None


class _Sampling(_Shape):
    model: Annotated[str | None, Field(description="the name of the run, as /v1/models has it")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)]
        | None
    ) = None
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    temperature: float | None = _option("temperature")
    top_p: float | None = _option("top_p")
    top_k: int | None = _option("top_k")
    min_p: float | None = _option("min_p")
    repetition_penalty: float | None = _option("repetition_penalty")
    presence_penalty: float | None = _option("presence_penalty")
    frequency_penalty: float | None = _option("frequency_penalty")

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, defaults: SamplingOptions, max_tokens: int, logprobs: int) -> SamplingOptions:
        """The sampling options of the first text; the run's own where the request has none.

        Raises:
          RequestError: a value is impossible.
        """
        drawn = {name: getattr(self, name) for name in _DRAWN if getattr(self, name) is not None}
        stop = defaults.stop if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**32
        values = vars(defaults) | drawn
        options = SamplingOptions(
            **values | {"stop": stop, "seed": seed, "max_tokens": max_tokens, "logprobs": logprobs}
        )
        try:
            options.check()
        except UserError as error:
            raise RequestError(str(error), str(error).split()[0]) from None
        return options


_DRAWN = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_ALTERNATIVES)] = None

    def conversation(self) -> tuple[str, list[Turn]]:
        """The system text, and the turns: user and assistant by turns, the user first and last.

        Messages of one role that follow each other are joined by a blank line; an answer that is empty is left out.
        Where the assistant opens, the system text is the user's turn, as in training.

        Raises:
          RequestError: a message is empty or stands where it cannot.
        """
        system: list[str] = []
        turns: list[Turn] = []
        for i, message in enumerate(self.messages):
            where, text = f"messages[{i}]", message.text
            for name in ("tool_calls", "function_call"):
                if getattr(message, name):
                    problem = f"{where}.{name} is not supported: the model calls no tools"
                    raise RequestError(problem, f"{where}.{name}", "unsupported_parameter")
            if not text and message.role == "assistant" and turns:
                continue  # an answer that ended at once, which clients send back as it came
            if not text:
                raise RequestError(f"{where}.content is empty", where)
            if message.role in ("system", "developer"):
                if turns:
                    raise RequestError(f"{where}: a {message.role} message can only come first", where)
                system.append(text)
            elif turns and turns[-1].role == message.role:
                turns[-1] = turns[-1]._replace(text=f"{turns[-1].text}\n\n{text}")
            else:
                if not turns and message.role == "assistant":
                    if not system:
                        raise RequestError(f"{where}: the user must speak before the assistant", where)
                    turns.append(Turn("user", "\n\n".join(system)))
                    system = []
                turns.append(Turn(message.role, text))
        if not turns or turns[-1].role != "user":
            raise RequestError("the last message must be the user's", "messages")
        return "\n\n".join(system), turns

    @property
    def asked_tokens(self) -> int | None:
        """The most tokens of an answer; None: the request does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_ALTERNATIVES)] = None
    best_of: Annotated[int | None, Field(ge=1, le=MOST_CHOICES)] = None

    def prompts(self) -> Sequence[str | list[int]]:
        """The texts, or token ids, to continue."""
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class Choices(NamedTuple):
    """The number of texts for each prompt, and of log-probabilities for each token."""

    count: int
    logprobs: int | None  # None: none; else the number of alternatives


def choices_of(request: ChatRequest | CompletionRequest) -> Choices:
    """The number of texts and of log-probabilities that a request asks for.

    Raises:
      RequestError: fields of it contradict each other.
    """
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream=true", "stream_options")
    count = request.n or 1
    if isinstance(request, CompletionRequest):
        if request.best_of not in (None, count):
            raise RequestError("best_of is not supported: give n", "best_of", "unsupported_parameter")
        return Choices(count, request.logprobs)
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
    return Choices(count, (request.top_logprobs or 0) if request.logprobs else None)


def parse(shape: type[BaseModel], value: Any) -> Any:
    """A request of the decoded JSON.

    Raises:
      RequestError: it is none; the message names the first field that is wrong.
    """
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    for name, neutral in _NEUTRAL.items():
        if name in value and value[name] not in neutral:
            raise RequestError(f"{name} is not supported", name, "unsupported_parameter")
    _check_texts(value)
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from None


def _check_texts(value: Any) -> None:
    """Raises RequestError if a text anywhere in a value has half of a surrogate pair."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str) and text_problem(one.replace("\0", "")):
            raise RequestError("a text of the body has half of a surrogate pair, which is not text")
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        left += one if isinstance(one, dict) else ()


def _explain(error: ValidationError) -> RequestError:
    """One of the errors as a line: of a union's members that of the one that was meant, which is of the right type."""
    worst = max(
        error.errors(include_url=False, include_context=False),
        key=lambda found: (not found["type"].endswith("_type"), len(found["loc"])),
    )
    loc = [part for part in worst["loc"] if isinstance(part, int) or (part.isidentifier() and part not in _KINDS)]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    message = worst["msg"][0].lower() + worst["msg"][1:]
    return RequestError(f"{path or 'the body'}: {message}", path or None)


_KINDS = {"str", "int", "float", "bool"}
