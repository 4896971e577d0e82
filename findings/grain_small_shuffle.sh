#!/usr/bin/env bash
# grain 0.2.18: an element of a shuffled dataset takes the longer, the fewer there are.
#
# A reader expects: the place of an element in the shuffled order costs the same for 10 records as for 10,000, or less.
# Seen: about 4 ms an element of 10 records, 0.4 ms of 100 and some microseconds of 10,000, on one processor core: a
# permutation of a fixed large range is walked until it comes back into the small one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check grain==0.2.18
cat >"$work/run.py" <<'PYTHON'
import importlib.metadata
import sys
import time

import grain

print('grain', importlib.metadata.version('grain'))


def microseconds(records):
    dataset, count = grain.MapDataset.range(records).shuffle(seed=0).repeat(), 300
    begun = time.process_time()
    for place in range(count):
        dataset[place]
    return (time.process_time() - begun) / count * 1e6


taken = {records: microseconds(records) for records in (10, 100, 1_000, 10_000)}
print({records: round(each) for records, each in taken.items()}, 'microseconds an element', file=sys.stderr)
for records in (10, 100):
    longer = taken[records] > 500 / records * taken[10_000]
    print(f'{records} records take more than {500 // records} times as long an element as 10,000: {longer}')
PYTHON
"$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
tail -1 "$work/log"
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
grain 0.2.18
10 records take more than 50 times as long an element as 10,000: True
100 records take more than 5 times as long an element as 10,000: True
SEEN
