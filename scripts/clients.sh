#!/usr/bin/env bash
# Real clients against a server that runs: OpenAI's and LangChain's, curl, and schemathesis with 500 cases and more of its schema.
#
#   python -m gpt_jax.serve RUN &  then  scripts/clients.sh [http://127.0.0.1:8000]
#
# They are installed into a folder of their own, CLIENTS (.cache/clients). Exits with 1 if one of them failed.
set -euo pipefail
cd "$(dirname "$0")/.."
url=${1:-http://127.0.0.1:8000}
clients=${CLIENTS:-.cache/clients}
if [ ! -x "$clients/bin/st" ]; then
    python3 -m venv "$clients"
    "$clients/bin/pip" install -q openai langchain-openai schemathesis
fi

echo "== curl"
ask='{"messages": [{"role": "user", "content": "Who is there?"}], "max_tokens": 8, "stream": true}'
curl -sSN "$url/v1/chat/completions" -H 'content-type: application/json' -d "$ask" | tail -n 2 | grep -F 'data: [DONE]'

"$clients/bin/python" - "$url" <<'PYTHON'
import sys

import openai
from langchain_openai import ChatOpenAI

url = sys.argv[1] + "/v1"
question = [{"role": "user", "content": "Who's there?"}]
with openai.OpenAI(base_url=url, api_key="none") as client:
    print(f"== openai {openai.__version__}")
    model = client.models.list().data[0].id
    options = {"model": model, "messages": question, "max_tokens": 12, "seed": 1}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    streamed = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    assert streamed[-1].usage == whole.usage
    print(repr(text), whole.choices[0].finish_reason, whole.usage.completion_tokens)
    try:
        client.chat.completions.create(**options, response_format={"type": "json_object"})
        raise SystemExit("response_format was not refused")
    except openai.BadRequestError as error:
        print(error)

print("== langchain")
chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=12, seed=1)
answer = chat.invoke([("system", "Be brief."), ("user", "Who's there?")])
print(repr(answer.content), answer.usage_metadata["total_tokens"], answer.response_metadata["finish_reason"])
print([chunk.content for chunk in chat.stream("Who's there?")])
print([answer.content for answer in chat.batch(["one", "two", "three"])])
PYTHON

echo "== schemathesis"
# Some 800 cases. A failure of the server itself is what counts, and answers of a shape that is not said.
"$clients/bin/st" run "$url/openapi.json" --max-examples="${EXAMPLES:-100}" --workers=4 --phases=examples,coverage,fuzzing \
    --checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance
