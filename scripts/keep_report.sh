#!/usr/bin/env bash
# Keeps the page of a run where readers of this repository find it: docs/reports/NAME has report.html and report.md, and
# pictures of the page as scripts/audit_page.sh saw it, which must find nothing.
#
#   scripts/keep_report.sh RUN NAME
#   PAGE_ONLY=1 scripts/keep_report.sh RUN NAME     # on a machine without a browser: no pictures
#   scripts/keep_report.sh - NAME                   # these, for a page that stands there already
#
# Where the run was, and with which Python, is left out of its command. Needs what audit_page.sh needs, and Pillow, which
# comes with matplotlib.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,10p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=docs/reports/$2
mkdir -p "$folder"
[ "$1" = - ] || "$python" - "$1" "$folder" <<'PYTHON'
import dataclasses
import shlex
import sys
from pathlib import Path

from gpt_jax.runs.find import find_run
from gpt_jax.runs.load import load_run
from gpt_jax.runs.report import make_report, write_files

name, folder = sys.argv[1:]
run = load_run(find_run(name, saved=False).workdir)
_, *words = shlex.split(run.info["command"])
command = shlex.join(["python", *(word for word in words if not word.startswith("--workdir="))])
run = dataclasses.replace(run, info=run.info | {"command": command})
print(write_files(make_report(run), Path(folder) / "report"))
PYTHON
rm -f "$folder/report.json" # the page has all of it
if grep -oE '"?/(home|root|tmp|work)/[^ "<]*' "$folder/report.md"; then
    echo "error: the report has paths of this machine, see above" >&2
    exit 1
fi
[ -z "${PAGE_ONLY:-}" ] || exit 0
pictures=$(mktemp -d)
trap 'rm -rf "$pictures"' EXIT
scripts/audit_page.sh "$pictures" "$folder/report.html"
"$python" - "$pictures" "$folder" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image

pictures, folder = map(Path, sys.argv[1:])
for shown, kept in (("report_1280_light", "wide"), ("report_390_dark", "narrow"), ("report_printed", "printed")):
    picture = Image.open(pictures / f"{shown}.png").convert("RGB")
    width = min(picture.width, 720)
    small = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    small.quantize(256, Image.Quantize.FASTOCTREE).save(folder / f"{kept}.png", optimize=True)
PYTHON
du -b "$folder"/*
