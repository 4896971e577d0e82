#!/usr/bin/env bash
# Real trackers show a run, and one whose server is killed in the middle changes nothing in it: MLflow and trackio with
# servers of their own, wandb offline, and TensorBoard's reader for settings and texts.
#
#   scripts/trackers.sh [FOLDER [mlflow] [trackio] [wandb]]    # FOLDER: for what the runs and the servers write
#
# They are installed into a folder of their own, TRACKERS (.cache/trackers, 0.8 GB), beside the packages of the Python
# that VENV (.venv) is of. Exits with 1 if one of them failed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
trackers=${TRACKERS:-.cache/trackers}
out=${1:-$(mktemp -d)}
mkdir -p "$out"
if [ ! -x "$trackers/bin/mlflow" ]; then
    "$venv/bin/python" -m venv "$trackers"
    "$trackers/bin/pip" install -q mlflow trackio wandb tensorboard
fi
# Their own packages come first, then those that the trainer needs.
"$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
    "$("$trackers/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/trainer.pth"
PATH="$trackers/bin:$PATH" PYTHONPATH=. "$trackers/bin/python" scripts/trackers.py "$out" "${@:2}"
