"""A run that goes on, and what it finds of the work before."""

import json

import pytest

from gpt_jax.training.history import lost_work

START = {"split": "event", "text": "started", "start_seconds": 5.0}
RECORDS = [
    {"step": 0, "time": 100, **START},
    {"step": 1, "time": 103, "split": "train"},
    {"step": 2, "time": 104, "split": "train"},
    {"step": 3, "time": 105.5, "split": "train"},
]
AGAIN = [  # an hour later, and killed before the next checkpoint
    {"step": 2, "time": 4000, "split": "event", "text": "resumed from 2", "start_seconds": 6.0, "lost_seconds": 1.5},
    {"step": 3, "time": 4002, "split": "train"},
    {"step": 4, "time": 4004, "split": "train"},
]


@pytest.mark.parametrize(
    ("records", "step", "found"),
    [
        ([], None, {}),
        (RECORDS[:3], 2, {}),
        (RECORDS, 2, {"lost_steps": 1, "lost_seconds": 1.5}),
        (RECORDS, None, {"lost_steps": 3, "lost_seconds": 5 + 5.5}),
        (RECORDS[:3] + AGAIN, 2, {"lost_steps": 2, "lost_seconds": 4}),
        (RECORDS[:3] + AGAIN, 1, {"lost_steps": 3, "lost_seconds": 1 + 6 + 1.5 + 4}),
        ([{"step": 1, "split": "train"}, {"step": 2, "time": "soon"}], 0, {"lost_steps": 2, "lost_seconds": 0}),
    ],
)
def test_lost_work_is_what_the_dropped_records_took_while_a_process_ran(records, step, found, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert lost_work(tmp_path, step) == found
