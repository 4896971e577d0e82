"""The keys that rows and messages of other people's formats have."""

from typing import Any

LISTS = ("messages", "conversations", "conversation")  # keys that hold messages
PAIRS = (  # keys of a question, of what belongs to it, and of the answer
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("question", "context", "answer"),
    ("query", None, "response"),
    ("input", None, "output"),
)
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "answer",
    "function": "answer",
    "observation": "answer",
    "function_response": "answer",
    "tool_response": "answer",
}
SIDES = {"system": "system", "user": "user", "assistant": "assistant", "call": "assistant", "answer": "user"}


def side_of(message: Any) -> str | None:
    """The side that a message's role belongs to, before it is checked."""
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return SIDES[ROLES[role]] if isinstance(role, str) and role in ROLES else None


def is_message(value: Any) -> bool:
    """Whether a value looks like a message. A row may have a `role` or `from` too, that says where it is from."""
    return isinstance(value, dict) and (
        ("role" in value and "content" in value) or ("from" in value and "value" in value) or side_of(value) is not None
    )
