"""The comparison of scripts/llama_cpp.sh, which says what it is: RUN MODEL GGUF PYTHON."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

from tokenizers import Tokenizer

NEW = 32  # tokens of a greedy text
LIMIT = 1e-2  # of log probabilities: llama.cpp keeps keys and values in f16, and its GELU is a table in f16
PROMPTS = [
    "Who's there?\nNay, answer me: stand, and unfold yourself.",
    "To be, or not to be",
    "  He'd said 1603 -- or 1604?  \n\n\tWe'LL see... it's 真 naïve 😀!",
]
CHATS = [
    [{"role": "user", "content": "What does it mean to live well?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who's there?"},
        {"role": "assistant", "content": "A friend."},
        {"role": "user", "content": "Enter!"},
    ],
]
LLAMA = """
import sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def server(*command: str) -> Iterator[str]:
    """The address that a server prints once it listens."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "http://" in line), None)
        if line is None:
            sys.exit(f"llama_cpp: no server came of {' '.join(command)!r}")
        yield "http://" + line.split("http://")[1].split("/")[0].strip()
    finally:
        process.kill()
        process.wait()


def ask(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def our_tokens(url: str, prompt: str) -> list[tuple[str, float]]:
    """The tokens of a greedy continuation with their log probabilities."""
    found = ask(f"{url}/v1/completions", {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "logprobs": 0})
    logprobs = found["choices"][0]["logprobs"]
    return list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))


def their_tokens(url: str, prompt: str) -> list[tuple[str, float]]:
    found = ask(f"{url}/completion", {"prompt": prompt, "n_predict": NEW, "temperature": 0, "n_probs": 1})
    return [(token["token"], token["logprob"]) for token in found["completion_probabilities"]]


def answer(url: str, messages: list[dict[str, str]]) -> str:
    found = ask(f"{url}/v1/chat/completions", {"messages": messages, "max_tokens": NEW, "temperature": 0})
    return found["choices"][0]["message"]["content"]


def main(run: str, model: str, gguf: str, python: str) -> None:
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    with (
        server(python, "-c", LLAMA, gguf) as theirs,
        server(sys.executable, "-m", "gpt_jax.serve", run, "--port=0") as ours,
    ):
        apart = 0.0
        for prompt in PROMPTS:
            ids = ask(f"{theirs}/tokenize", {"content": prompt})["tokens"]
            assert ids == tokenizer.encode(prompt).ids, (prompt, ids)
            found, expected = our_tokens(ours, prompt), their_tokens(theirs, prompt)
            if len(found) < len(expected) and not expected[len(found)][0]:  # a marker, which ends an answer here
                expected = expected[: len(found)]
            assert [text for text, _ in found] == [text for text, _ in expected], (found, expected)
            apart = max([apart, *(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True))])
            text = "".join(token for token, _ in found)
            print(f"{len(ids)} tokens, and {len(found)} that follow, are the same: {text[:60]!r}")
        assert apart < LIMIT, apart
        for messages in CHATS:
            found, expected = answer(ours, messages), answer(theirs, messages)
            assert found.strip() == expected.strip(), (found, expected)
            print(f"a chat of {len(messages)} messages is answered the same: {found[:60]!r}")
        print(f"log probabilities are {apart:.1e} apart at most")


if __name__ == "__main__":
    main(*sys.argv[1:])
