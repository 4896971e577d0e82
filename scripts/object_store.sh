#!/usr/bin/env bash
# gpt_jax.export --to s3:// against a server of S3's protocol on this machine (moto's), with s3fs: what a store has then,
# a server that goes away half way, and one that refuses.
#
#   scripts/object_store.sh
#
# The packages are installed into a folder of their own, STORE (.cache/store), which sees those of .venv. Exits with 1 if
# something is not as said.
set -euo pipefail
cd "$(dirname "$0")/.."
store=${STORE:-.cache/store}
python=${PYTHON:-.venv/bin/python}
if [ ! -x "$store/bin/moto_server" ]; then
    "$python" -m venv "$store"
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$site" >"$("$store/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
    fsspec=$("$python" -c 'import fsspec; print(fsspec.__version__)')
    "$store/bin/pip" install -q --disable-pip-version-check "s3fs==$fsspec" 'moto[server,s3]'
fi
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$work"' EXIT
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
export AWS_DEFAULT_REGION=us-east-1 AWS_MAX_ATTEMPTS=2 AWS_EC2_METADATA_DISABLED=true
start() {
    "$store/bin/moto_server" -H 127.0.0.1 -p "$port" >"$work/server.log" 2>&1 &
    server=$!
    for _ in $(seq 150); do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && return
        sleep 0.2
    done
    cat "$work/server.log" >&2
    exit 1
}
start
PYTHONPATH=.:tests "$store/bin/python" tests/huggingface/object_store.py "$work" "$server"
