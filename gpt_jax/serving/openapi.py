"""The server's OpenAPI schema, made of the classes that requests are checked by and answers are built of."""

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from gpt_jax.serving.requests import ChatRequest, CompletionRequest
from gpt_jax.serving.responses import ChatCompletion, Error, Health, Model, ModelList, TextCompletion

_REF = "#/components/schemas/{model}"
_ANSWERS = (ChatCompletion, TextCompletion, Model, ModelList, Health, Error)


def schema(model: str, *, with_key: bool) -> dict[str, Any]:
    """The schema of a server of a model; with_key: whether it asks for an API key."""
    _, requests = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")], ref_template=_REF
    )
    _, answers = TypeAdapter.json_schemas(
        [(answer.__name__, "serialization", TypeAdapter(answer)) for answer in _ANSWERS], ref_template=_REF
    )
    key = {"security": [{"key": []}]} if with_key else {}
    paths = {
        "/v1/chat/completions": {"post": _post(ChatRequest, ChatCompletion, "Answers a conversation.") | key},
        "/v1/completions": {"post": _post(CompletionRequest, TextCompletion, "Continues texts.") | key},
        "/v1/models": {"get": _get(ModelList, "Lists the one model.") | key},
        "/v1/models/{model}": {
            "get": _get(Model, "Describes the model.", 404)
            | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}
            | key
        },
        "/health": {"get": _get(Health, "Tells whether requests are answered.") | {}},
        "/metrics": {
            "get": {
                "summary": "Tells counters in Prometheus's format.",
                "responses": {"200": {"description": "counters", "content": {"text/plain": {"schema": _TEXT}}}},
            }
            | key
        },
    }
    paths["/health"]["get"]["responses"]["503"] = _response(Health, "the device failed")
    components: dict[str, Any] = {"schemas": {**requests.get("$defs", {}), **answers.get("$defs", {})}}
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path in paths.values():
            for operation in path.values():
                if "security" in operation:
                    operation["responses"]["401"] = _response(Error, _MEANING[401])
    return {
        "openapi": "3.1.0",
        "info": {"title": f"gpt_jax serves {model}", "version": "1"},
        "paths": paths,
        "components": components,
    }


_TEXT = {"type": "string"}
_EVENT = {"type": "object", "properties": {"data": _TEXT}, "required": ["data"]}  # of server-sent events, each
_MEANING = {
    400: "the request is wrong; the message says where",
    401: "the API key is wrong or missing",
    404: "there is no such model",
    408: "the body came too slowly",
    413: "the body is too long",
    415: "the body is not declared to be JSON",
    429: "too many requests wait, or are open",
    503: "the device failed",
    504: "not answered in time",
}


def _response(shape: type, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"$ref": _ref(shape)}}}}


def _ref(shape: type) -> str:
    return _REF.format(model=shape.__name__)


def _get(answer: type, summary: str, *failures: int) -> dict[str, Any]:
    found = {str(status): _response(Error, _MEANING[status]) for status in failures}
    return {"summary": summary, "responses": {"200": _response(answer, "the answer"), **found}}


def _post(request: type, answer: type, summary: str) -> dict[str, Any]:
    operation = _get(answer, summary, 400, 404, 408, 413, 415, 429, 503, 504)
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": _EVENT}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": _ref(request)}}}}
    return {**operation, "requestBody": body}
