"""A run tells its alerts where it was asked to, and keeps the address to itself."""

import http.server
import json
import sys
import threading
from types import SimpleNamespace

import pytest
from tiny_run import tiny

from gpt_jax.errors import UserError
from gpt_jax.runs.metrics import read_lines
from gpt_jax.training import trainer
from gpt_jax.training.train import train_and_evaluate


class Listening(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_disk_that_fills_is_told_in_log_metrics_report_and_webhook_and_no_file_has_its_url(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listening) as server:
        server.bodies = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/services/T0-secret"
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "gpt_jax.main", f"--config.log.webhook={url}"])
        spare = {"sample__every": 0, "eval__every": 0, "log__diagnostics_every": 0}
        config = tiny(corpus, num_steps=4, log__webhook=url, **spare)
        train_and_evaluate(config, tmp_path / "run", config_file={"path": "configs/x.py", "values": {}})
        server.shutdown()
        thread.join()
    assert [(body["name"], body["step"], body["rule"]) for body in server.bodies] == [("chat_tiny", 4, "disk")]
    folder = tmp_path / "run"
    [event] = [line for line in read_lines(folder / "metrics.jsonl") if line.get("rule")]
    assert (event["step"], event["rule"]) == (4, "disk")
    assert "alert at step 4, disk: 1 B are free" in (folder / "log.txt").read_text()
    assert "| 4 | disk | 1 B are free" in (folder / "report.md").read_text()
    told = [file for file in folder.rglob("*") if file.is_file() and b"secret" in file.read_bytes()]
    assert told == []
    assert json.loads((folder / "config.json").read_text())["log"]["webhook"].endswith("/...")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log__tracker": "mlfow"}, "config.log.tracker must be one of none, wandb, trackio, mlflow; found 'mlfow'"),
        ({"log__tracker": "trackio"}, "trackio is not installed: install the extra `trackio`"),
        ({"log__webhook": "hooks.example/secret"}, "config.log.webhook must be a URL of http or https"),
    ],
)
def test_what_a_run_cannot_be_shown_by_is_said_before_a_folder_is_made(corpus, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        train_and_evaluate(tiny(corpus, **change), tmp_path / "run")
    assert message in str(caught.value)
    assert "hooks.example" not in str(caught.value)
    assert not (tmp_path / "run").exists()
