"""The work of scripts/trackers.sh, which says what it is."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt_jax.runs.tracker_services import SERVICES

OUT = Path(sys.argv[1]).absolute()  # made by the caller
STEPS = 600
SMALL = [
    *(f"num_steps={STEPS}", "batch_size=4", "backend=xla", "eval.every=200", "eval.batches=2", "sample.every=300"),
    *("sample.max_tokens=8", "checkpoint.every=200", "log.every=10", "log.diagnostics_every=300"),
    *("model.vocab_size=300", "model.block_size=32", "model.num_layers=1", "model.num_heads=2", "model.embed_dim=48"),
]


def write_chats(file: Path) -> Path:
    words = ["sun", "moon", "star", "sea", "hill", "tree", "bird", "stone", "wind", "rain"]
    with file.open("w") as out:
        for i in range(300):
            turns = [" ".join(words[(i * k + j) % 10] for j in range(9)) for k in (3, 7)]
            both = zip(("user", "assistant"), turns, strict=True)
            messages = [{"role": role, "content": f"{text} {i}"} for role, text in both]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def start(name: str, tracker: str, **variables: str) -> tuple[Path, subprocess.Popen]:
    """Begins a run; its output goes to NAME.out."""
    data = {"data.source": OUT / "chats.jsonl", "data.cache_dir": OUT / "cache", "log.tracker": tracker}
    values = [*SMALL, *(f"{setting}={value}" for setting, value in data.items())]
    command = [sys.executable, "-m", "gpt_jax.main", "--config=configs/chat_tiny.py", f"--workdir={OUT / name}"]
    command += [f"--config.{value}" for value in values]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **variables}
    with (OUT / f"{name}.out").open("w") as file:
        return OUT / name, subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def finish(folder: Path, process: subprocess.Popen) -> list[tuple]:
    """Waits for a run; returns its losses, and prints what its log says of the tracker."""
    code = process.wait(1200)
    log = (folder / "log.txt").read_text()
    assert code == 0, (folder, code)
    for line in log.splitlines():
        if line.startswith("tracker"):
            print(f"   {line}")
    return losses(folder)


def losses(folder: Path) -> list[tuple]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["split"] == "train"]


def wait_for(what: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 600
    while not what():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < end
        time.sleep(0.05)


def reached(folder: Path, step: int) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and file.read_bytes().count(b'"split": "train"') >= step


@contextlib.contextmanager
def paused(folder: Path, training: subprocess.Popen, arrived: Callable[[], bool]) -> Iterator[None]:
    """Stops a trainer that has come some way, until what it sent has arrived and what is to happen has happened."""
    wait_for(lambda: reached(folder, 100), training)
    training.send_signal(signal.SIGSTOP)
    wait_for(arrived, training)
    yield
    training.send_signal(signal.SIGCONT)


def written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def server(name: str, port: int, command: list[str], **variables: str) -> Iterator[subprocess.Popen]:
    with (OUT / f"{name}.out").open("w") as file:
        environment = {**os.environ, **variables}
        process = subprocess.Popen(
            command, env=environment, cwd=OUT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        wait_for(answers, process)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def mlflow_server(port: int) -> contextlib.AbstractContextManager:
    database = f"sqlite:///{OUT / 'mlflow.db'}"
    options = ["--host=127.0.0.1", f"--port={port}", "--workers=1", f"--backend-store-uri={database}"]
    command = ["mlflow", "server", *options, f"--artifacts-destination={OUT / 'artifacts'}"]
    return server("mlflow_server", port, command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")


def mlflow(plain: list[tuple]) -> None:
    from mlflow import MlflowClient

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with mlflow_server(port):
        client = MlflowClient(address)
        assert finish(*start("mlflow", "mlflow", MLFLOW_TRACKING_URI=address)) == plain
        [experiment] = client.search_experiments(filter_string="name = 'gpt_jax'")
        [run] = client.search_runs([experiment.experiment_id])
        points = client.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in points] == [1, *range(10, STEPS + 1, 10)]
        by_step = {step: loss for step, loss, _ in plain}
        assert all(point.value == by_step[point.step] for point in points)
        assert run.info.status == "FINISHED"
        assert run.data.params["model.num_layers"] == "1"
        texts = [file.path for file in client.list_artifacts(run.info.run_id, "sample")]
        print(
            f"   {len(points)} losses, {len(run.data.metrics)} metrics, {len(run.data.params)} settings, texts {texts}"
        )
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with mlflow_server(port) as process:
        client = MlflowClient(address)
        folder, training = start("mlflow_killed", "mlflow", MLFLOW_TRACKING_URI=address)

        def points_arrive() -> bool:
            found = client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
            return any(client.get_metric_history(run.info.run_id, "train/loss") for run in found)

        with paused(folder, training, points_arrive):
            kill(process)
            print(f"   server killed at step {losses(folder)[-1][0]}")
        assert finish(folder, training) == plain
    with mlflow_server(port):
        client = MlflowClient(address)
        folder, training = start("mlflow_run_killed", "mlflow", MLFLOW_TRACKING_URI=address)

        def status() -> str:
            run_id = json.loads((folder / "run.json").read_text())["run_id"]
            found = client.search_runs([experiment.experiment_id], f"tags.run_id = '{run_id}'")
            return found[0].info.status if found else ""

        with paused(folder, training, lambda: status() == "RUNNING"):
            training.kill()
        training.wait()
        end = time.monotonic() + 60
        while status() != "FAILED" and time.monotonic() < end:
            time.sleep(0.5)
        print(f"   trainer killed: its run is {status()} there")
        assert status() == "FAILED"
        assert finish(*start("mlflow_run_killed", "mlflow", MLFLOW_TRACKING_URI=address)) == plain
        assert status() == "FINISHED"


def trackio(plain: list[tuple]) -> None:
    token, port = "a-token-of-this-test", free_port()
    home = {"TRACKIO_DIR": str(OUT / "trackio")}
    assert finish(*start("trackio", "trackio", **home)) == plain
    listed = subprocess.run(["trackio", "list", "runs", "--project=gpt_jax", "--json"], env={**os.environ, **home},
                            capture_output=True, text=True, check=True).stdout  # fmt: skip
    print("   local:", " ".join(listed.split()))
    assert "chat_tiny" in listed
    away = {"TRACKIO_DIR": str(OUT / "trackio_server"), "TRACKIO_WRITE_TOKEN": token}
    code = (
        "import time, trackio; "
        f"trackio.show(host='127.0.0.1', server_port={port}, open_browser=False, block_thread=True)"
    )
    where = {
        "TRACKIO_DIR": str(OUT / "trackio_client"),
        "TRACKIO_SERVER_URL": f"http://127.0.0.1:{port}",
        "TRACKIO_WRITE_TOKEN": token,
    }
    with server("trackio_server", port, [sys.executable, "-c", code], **away) as process:
        assert finish(*start("trackio_away", "trackio", **where)) == plain
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            assert answer.status == 200
        before = written(OUT / "trackio_server")
        folder, training = start("trackio_killed", "trackio", **where)
        with paused(folder, training, lambda: written(OUT / "trackio_server") > before):
            kill(process)
            print(f"   server killed at step {losses(folder)[-1][0]}")
        assert finish(folder, training) == plain
    rows = "select run_name, count(*), max(step) from metrics group by run_name"
    with sqlite3.connect(OUT / "trackio_server" / "gpt_jax.db") as database:
        whole, cut = sorted(database.execute(rows).fetchall())
    print(f"   on the server: {whole}, and of the run that it was killed in {cut}")
    assert whole[2] == STEPS > cut[2]


def wandb(plain: list[tuple]) -> None:
    folder, training = start("wandb", "wandb", WANDB_MODE="offline")
    assert finish(folder, training) == plain
    [file] = (folder / "tracker" / "wandb").glob("offline-run-*/run-*.wandb")
    print(f"   {file.relative_to(OUT)}: {file.stat().st_size:,} bytes")
    folder, training = start("wandb_killed", "wandb", WANDB_MODE="offline")
    with paused(folder, training, lambda: any((folder / "tracker" / "wandb").glob("offline-run-*/run-*.wandb"))):
        [child] = Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
    assert finish(folder, training) == plain
    folder, training = start("wandb_no_key", "wandb", WANDB_API_KEY="", WANDB_MODE="online")
    assert finish(folder, training) == plain


def tensorboard(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    found.Reload()
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    texts = list(found.PluginTagToContent("text"))
    print(f"   {len(settings)} settings, texts {texts}")
    assert settings["model.num_layers"].number_value == 1
    assert any(name.startswith("sample/") for name in texts)


def main() -> None:
    write_chats(OUT / "chats.jsonl")
    print("== none")
    plain = finish(*start("plain", "none"))
    assert len(plain) == STEPS
    for name, show in (("mlflow", mlflow), ("trackio", trackio), ("wandb", wandb)):
        if name in (sys.argv[2:] or SERVICES):
            print(f"== {name}", flush=True)
            show(plain)
    print("== tensorboard")
    tensorboard(OUT / "plain")
    print("all runs have the same losses and norms, bit for bit")


main()
