#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: CheckpointManager with best_fn takes a NaN metric for the best one.
#
# A reader expects: of the losses 2.0, NaN and 3.0 with best_mode='min' and max_to_keep=1, step 1 stays.
# Seen: step 2, whose loss is NaN, becomes the best and step 1 is deleted; then step 3 (3.0) in its place.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2
cat >"$work/run.py" <<'PYTHON'
import tempfile

import numpy as np
import orbax.checkpoint as ocp

print('orbax-checkpoint', ocp.__version__)
options = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: metrics['loss'], best_mode='min')
with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder, options=options) as manager:
    for step, loss in [(1, 2.0), (2, float('nan')), (3, 3.0)]:
        manager.save(step, args=ocp.args.StandardSave({'x': np.zeros(2)}), metrics={'loss': loss})
        manager.wait_until_finished()
        print(f'after step {step} with loss {loss}: kept {list(manager.all_steps())}, best {manager.best_step()}')
PYTHON
"$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
orbax-checkpoint 0.12.8
after step 1 with loss 2.0: kept [1], best 1
after step 2 with loss nan: kept [2], best 2
after step 3 with loss 3.0: kept [3], best 3
SEEN
