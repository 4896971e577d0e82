#!/usr/bin/env bash
# openai 3.57.0 (Python client): two errors of a streamed answer that it does not raise.
#
# A reader expects: a server-sent event named 'error', and a plain JSON answer to a request with stream=True, raise.
# Seen: the event's data is handed on as a chunk without choices; the JSON answer is a stream of nothing. Only
# {"error": ...} inside an event's data raises.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check openai==3.57.0
cat >"$work/run.py" <<'PYTHON'
import http.server
import threading

import openai

ANSWERS = {
    'an event named error': ('text/event-stream', 'event: error\ndata: {"message": "no room"}\n\ndata: [DONE]\n\n'),
    'an error in data': ('text/event-stream', 'data: {"error": {"message": "no room"}}\n\n'),
    'a JSON answer': ('application/json', '{"object": "chat.completion", "choices": [], "model": "m", "id": "1", "created": 1}'),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers['content-length']))
        kind, body = ANSWERS[self.headers['x-answer']]
        self.send_response(200)
        self.send_header('content-type', kind)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(
    base_url=f'http://127.0.0.1:{server.server_port}/v1',
    api_key='none',
    max_retries=0,
)
print('openai', openai.__version__)
for name in ANSWERS:
    try:
        stream = client.chat.completions.create(
            model='m', messages=[{'role': 'user', 'content': 'Hi'}], stream=True, extra_headers={'x-answer': name}
        )
        print(f'{name}: chunks {[chunk.to_dict() for chunk in stream]}')
    except openai.APIError as error:
        print(f'{name}: {type(error).__name__}: {error}')
PYTHON
NO_PROXY=127.0.0.1 "$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
openai 3.57.0
an event named error: chunks [{'message': 'no room'}]
an error in data: APIError: no room
a JSON answer: chunks []
SEEN
