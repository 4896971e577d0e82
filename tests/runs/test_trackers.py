"""Trackers and the webhook: they are told of a run, and nothing that they do stops it or makes it wait."""

import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from waiting import PATIENCE, wait_for

from configs import chat_tiny
from gpt_jax.config_file import describe_changes
from gpt_jax.errors import UserError
from gpt_jax.runs import trackers, webhook
from gpt_jax.runs.info import command_line, write_json
from gpt_jax.runs.metrics import MetricsWriter
from gpt_jax.runs.outbox import Outbox
from gpt_jax.runs.tracker_process import SAID, TrackerProcess, serve
from gpt_jax.runs.tracker_services import SERVICES, TrackedRun, check_service

SECRET = "https://user:pass@hooks.example/services/T0/abc?key=1"


def tracked(folder: Path) -> TrackedRun:
    return TrackedRun("id_1", "chat", str(folder), {"seed": 1})


class FakeService:
    """A service that notes its calls, and fails at a step."""

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.calls = run, []

    def scalars(self, step, values, now):
        if step in (2, 3):
            raise ConnectionError("the server\nis gone")
        self.calls.append((step, values))

    def text(self, step, name, text, now):
        self.calls.append((step, name, text))

    def alert(self, step, rule, text, now):
        self.calls.append((step, rule, text))

    def finish(self, status):
        self.calls.append(status)


# ---- the library's side


@pytest.fixture
def alarms(monkeypatch) -> list[int]:
    """The seconds after which a library's process would be ended, which is the tests' own here."""
    asked: list[int] = []
    monkeypatch.setattr(signal, "alarm", asked.append)
    return asked


def lines_of(folder: Path, *calls: dict) -> list[bytes]:
    start = {"service": "fake", "run": tracked(folder)._asdict()}
    return [json.dumps(line).encode() + b"\n" for line in (start, *calls)]


def scalars(step: int) -> dict:
    return {"call": "scalars", "step": step, "values": {"train/loss": 1.0}, "now": 5.0}


@pytest.mark.parametrize(("status", "ends"), [("completed", "completed"), ("running", "crashed"), ("failed", "failed")])
def test_a_service_does_what_the_lines_say_and_ends_as_the_run_did(status, ends, tmp_path, capsys, alarms):
    write_json(tmp_path / "run.json", {"status": status})
    made, said = [], []
    calls = [scalars(1), scalars(2), scalars(3), scalars(4)]
    calls += [{"call": "alert", "step": 5, "rule": "spike", "text": "high", "now": 5.0}]
    calls += [{"call": "text", "step": 6, "name": "sample/Hi?", "text": "hé", "now": 5.0}]
    code = serve(
        lines_of(tmp_path, *calls), said.append, {"fake": lambda run: made.append(FakeService(run)) or made[0]}
    )
    [service] = made
    assert (code, service.run, alarms) == (0, tracked(tmp_path), [60])
    assert service.calls == [
        (1, {"train/loss": 1.0}),
        (4, {"train/loss": 1.0}),
        (5, "spike", "high"),
        (6, "sample/Hi?", "hé"),
        ends,
    ]
    assert len(said) == 1  # of two failures
    assert "scalars failed at step 2, it goes on trying: ConnectionError: the server" in said[0]
    capsys.readouterr()


def test_a_trainer_that_is_killed_in_the_middle_of_a_line_has_crashed(tmp_path, alarms):
    write_json(tmp_path / "run.json", {"status": "running"})
    service, said = FakeService(tracked(tmp_path)), []
    *lines, last = lines_of(tmp_path, scalars(1), scalars(4))
    assert serve([*lines, last[:20]], said.append, {"fake": lambda run: service}) == 0
    assert (service.calls, said) == ([(1, {"train/loss": 1.0}), "crashed"], [])


def test_a_service_that_cannot_begin_says_why(tmp_path, capsys):
    def refuse(run):
        raise ValueError("no key")

    said = []
    assert serve(lines_of(tmp_path, scalars(1)), said.append, {"fake": refuse}) == SAID
    assert said == ["did not begin, the run goes on without it: ValueError: no key"]
    capsys.readouterr()


def test_a_library_runs_in_a_process_of_its_own_and_ends_with_the_run(tmp_path, monkeypatch):
    """The whole way, with a module in trackio's place."""
    library = "\n".join(
        (
            "import os, pathlib, sys",
            "class Run:",
            "    def __init__(self, name, config): self.said = [name, sorted(config)]; print('chatter')",
            "    def log(self, values, step): self.said.append([step, {k: str(v) for k, v in values.items()}])",
            "    def alert(self, title, text, step): self.said.append([step, title, text])",
            "    def finish(self):",
            "        text = repr((os.getpid(), 'jax' in sys.modules, sys.stdin.read(), self.said))",
            f"        pathlib.Path({str(tmp_path / 'said')!r}).write_text(text)",
            "Markdown = str",
            "def init(project, *, name, config, resume, embed): return Run(name, config)",
        )
    )
    (tmp_path / "trackio.py").write_text(library)
    monkeypatch.syspath_prepend(tmp_path)
    config = chat_tiny.get_config()
    config.log.tracker = "trackio"
    logged = []
    check_service("trackio")
    with trackers.open_trackers(config, tmp_path, "id_1", "", logged.append) as opened:
        with MetricsWriter(tmp_path, tensorboard=False, trackers=opened) as writer:
            writer.write(1, "train", {"loss": 8.0})  # between logging steps
            writer.write(50, "train", {"loss": float("nan"), "step_ms": 1.0, "finite": True})
            writer.write(50, "event", {"text": "something"})
            writer.sample(50, "Hi?", "hé", tokens=1, seconds=0.1)
            writer.alert(50, "spike", "high")
        write_json(tmp_path / "run.json", {"status": "completed"})
    assert logged == []
    pid, has_jax, stdin, said = eval((tmp_path / "said").read_text())
    assert pid != os.getpid()
    assert (has_jax, stdin) == (False, "")
    assert said[0] == "chat_tiny id_1"
    assert "model.num_layers" in said[1]
    assert said[2:] == [
        [50, {"train/loss": "nan", "train/step_ms": "1.0", "train/finite": "True"}],
        [50, {"event/text": "something"}],
        [50, {"sample/Hi?": "hé"}],
        [50, "spike", "high"],
    ]
    assert "chatter" in (tmp_path / "tracker" / "log.txt").read_text()


# ---- the trainer's side


def test_a_tracker_that_hangs_makes_no_call_wait_and_is_stopped_at_the_end(tmp_path):
    logged = []
    tracker = TrackerProcess("wandb", tracked(tmp_path), logged.append, ["sleep", "100"])
    for step in range(3000):  # more than its queue and its pipe hold: one call that waits would wait for all of it
        tracker.scalars(step, {f"train/{i}": 1.0 for i in range(20)}, 0.0)
    assert tracker._process.poll() is None
    began = time.perf_counter()
    tracker.close(patience=0.2)
    assert time.perf_counter() - began < 50
    assert logged == [
        "tracker wandb: takes nothing at the moment: what does not fit into its queue is dropped",
        "tracker wandb: did not end within 0 s and was stopped; what it has not sent is in the run's folder",
    ]


def test_a_tracker_that_is_killed_in_the_middle_is_told_once_and_the_run_goes_on(tmp_path):
    logged = []
    with TrackerProcess("mlflow", tracked(tmp_path), logged.append, ["cat"]) as tracker:
        tracker.scalars(1, {"train/loss": 1.0}, 0.0)
        tracker._process.send_signal(signal.SIGKILL)
        tracker._process.wait()
        tracker._reader.join()
        for step in range(2, 2000):
            tracker.scalars(step, {"train/loss": 1.0}, 0.0)
            tracker.alert(step, "spike", "high", 0.0)
    told = [line for line in logged if "ended" in line]
    assert told == ["tracker mlflow: ended by itself (exit code -9), the run goes on without it; see tracker/log.txt"]


def test_what_cannot_be_started_is_told(tmp_path, monkeypatch):
    config, logged = chat_tiny.get_config(), []
    config.log.tracker = "trackio"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with trackers.open_trackers(config, tmp_path, "id_1", "", logged.append) as opened:
        assert opened == []
    assert logged == ["tracker trackio: cannot be started, the run goes on without it: No such file or directory"]


def test_a_queue_drops_and_tells_each_thing_once():
    logged, sent, gate = [], [], threading.Event()

    def send(item: int) -> None:
        gate.wait(PATIENCE)
        if item % 2:
            raise OSError(f"odd\n{item % 4}")
        sent.append(item)

    outbox: Outbox[int] = Outbox("it", send, logged.append, size=10)
    for item in range(50):
        outbox.put(item)
    assert outbox.close(0.01) is False
    assert outbox.dropped in (39, 40)
    gate.set()
    assert outbox.close(PATIENCE) is True
    assert sent[:2] == [0, 2]
    assert sorted(logged) == [
        "it failed: odd 1",
        "it failed: odd 3",
        "it takes nothing at the moment: what does not fit into its queue is dropped",
    ]


# ---- what is asked for


def test_a_library_that_is_missing_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()  # which wandb makes where it runs offline: no package
    for name in SERVICES:
        with pytest.raises(UserError, match=rf"{name} is not installed: install the extra `{name}`"):
            check_service(name)
    check_service("none")


def test_mlflow_wants_a_server(tmp_path, monkeypatch):
    (tmp_path / "mlflow.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        check_service("mlflow")


# ---- the webhook


class Answering(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        if self.server.hangs.wait(0 if len(self.server.bodies) < 3 else PATIENCE):
            return
        self.send_response(200 if len(self.server.bodies) == 1 else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        server.bodies, server.hangs = [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.hangs.set()
        server.shutdown()
        thread.join()


def test_alerts_are_posted_and_a_server_that_fails_or_hangs_is_told_once(server, monkeypatch):
    logged = []
    for name in ("TIMEOUT", "PATIENCE"):
        monkeypatch.setattr(webhook, name, PATIENCE)
    hook = webhook.Webhook(
        f"http://127.0.0.1:{server.server_port}/secret", {"run": "id", "name": "chat"}, logged.append
    )
    hook.scalars(1, {}, 0.0)
    for step in (1000, 2000):
        hook.alert(step, "spike", "gradient norm 50", 0.0)
    wait_for(lambda: hook._outbox._items.unfinished_tasks == 0)
    monkeypatch.setattr(webhook, "TIMEOUT", 0.2)  # the server hangs from here on
    hook.alert(3000, "spike", "gradient norm 50", 0.0)
    hook.close()
    wait_for(lambda: len(server.bodies) == 3)
    assert [body["step"] for body in server.bodies] == [1000, 2000, 3000]
    assert server.bodies[0] == {
        "text": "chat: alert at step 1,000, spike: gradient norm 50",
        "run": "id",
        "name": "chat",
        "step": 1000,
        "rule": "spike",
        "message": "gradient norm 50",
    }
    assert logged == ["config.log.webhook failed: answered with 503", "config.log.webhook failed: TimeoutError"]


def test_where_nobody_listens_that_is_told_without_the_url():
    logged = []
    hook = webhook.Webhook("http://127.0.0.1:9/secret", {}, logged.append)
    hook.alert(1, "gap", "open", 0.0)
    hook.close()
    assert logged == ["config.log.webhook failed: Connection refused"]


@pytest.mark.parametrize("value", ["hooks.example/abc", "ftp://x/abc", "http://", "http://x:port/abc", "${A", "$A B"])
def test_what_is_no_url_is_refused_and_not_shown(value):
    with pytest.raises(UserError) as caught:
        webhook.resolve(value)
    assert value not in str(caught.value)
    assert "abc" not in webhook.public_url(value)


def test_a_url_may_stand_in_a_variable(monkeypatch):
    monkeypatch.setenv("ALERTS", SECRET)
    monkeypatch.delenv("NOWHERE", raising=False)
    assert webhook.resolve("$ALERTS") == webhook.resolve("${ALERTS}") == webhook.resolve(SECRET) == SECRET
    assert webhook.public_url("$ALERTS") == "$ALERTS"
    with pytest.raises(UserError, match=r"is \$NOWHERE, and that environment variable is not set"):
        webhook.resolve("$NOWHERE")
    assert webhook.resolve("") == ""


def test_no_file_of_a_run_holds_the_url(monkeypatch):
    assert webhook.public_url(SECRET) == "https://hooks.example/..."
    assert webhook.public_url(webhook.public_url(SECRET)) == "https://hooks.example/..."
    assert webhook.resolve("https://hooks.example/...") == ""  # a run that goes on by its own config
    words = ["python", "-m", "gpt_jax.main", f"--config.log.webhook={SECRET}", "-config.log.webhook", SECRET, "--x=1"]
    monkeypatch.setattr(sys, "orig_argv", words)
    shown = command_line()
    assert not any("abc" in word or "pass" in word for word in shown)
    assert shown[-1] == "--x=1"


def test_the_url_of_a_config_file_is_no_part_of_what_was_changed():
    class Flag:
        parser = type("Parser", (), {"file": ("configs/mine.py", {"log.webhook": SECRET, "seed": 1})})

    changes = describe_changes(ConfigDict({"log": {"webhook": ""}, "seed": 1}), {"config": Flag})
    assert changes == {"path": "configs/mine.py", "values": {"log.webhook": "https://hooks.example/..."}}
