"""The training loop: steps, those that are skipped, and the evaluations, statistics, samples and checkpoints due.

A run is a folder. Running the same folder again goes on where its newest good checkpoint stands, and on one
machine gives the very bits that an uninterrupted run gives: the state, the place in the data and the clock are one
checkpoint, and every random choice is a function of the seed and the step.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gpt_jax.backend import Backend, describe
from gpt_jax.checkpoint import Checkpointer
from gpt_jax.data import batches, token_cache
from gpt_jax.data.dialogue import Turn
from gpt_jax.distributed.processes import ALONE, Processes
from gpt_jax.inference.decoder import Decoder
from gpt_jax.inference.generate import answer
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.leaf_names import named_leaves
from gpt_jax.log import Log
from gpt_jax.model.gpt import ModelConfig, make_model
from gpt_jax.model.lora import is_adapter
from gpt_jax.runs.alerts import NON_FINITE, Alert, Alerts
from gpt_jax.runs.flops import device_peak_flops, model_flops_utilisation
from gpt_jax.runs.folder import PROFILE
from gpt_jax.runs.info import RunInfo, host_peak_bytes, write_json
from gpt_jax.runs.kernel_floors import PROFILE_FILE
from gpt_jax.runs.metrics import LOSS_OF, MetricsWriter
from gpt_jax.signals import StopSignal
from gpt_jax.storage.files import writing
from gpt_jax.training.adapters import saved_part
from gpt_jax.training.early_stopping import Evaluation, why_stop
from gpt_jax.training.failures import TrainingFailed
from gpt_jax.training.history import LAST_CHECKPOINT, NOTHING, Recorded
from gpt_jax.training.programs import Programs
from gpt_jax.training.steps import Batch, TrainState

READ_BACK_LAG = 2  # steps whose metrics may still be on their way while the next one is dispatched
EARLY_LINES = (1, 10)  # steps of a process that have a line of progress: the first, which compiles, and one beyond it
MOST_SAMPLES = 8  # side by side
LEAD = READ_BACK_LAG + 2  # steps from the announcement of a stop to the stop: no process is that far ahead
SAMPLING = 1  # purpose of a random key; dropout needs none, its bits are keyed by seed and step


class PhaseClock:
    """Seconds spent, by phase; everything that is not in a named phase is the steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, collections.defaultdict(float)
        return taken


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: all that stays from its first step to its last. beside: see `adapters.position_of_adapters`."""

    config: ConfigDict
    workdir: Path
    backend: Backend
    programs: Programs
    corpus: token_cache.Corpus
    checkpointer: Checkpointer
    writer: MetricsWriter
    info: RunInfo
    log: Log
    beside: dict[str, Any]
    processes: Processes = ALONE


@dataclasses.dataclass(frozen=True)
class Start:
    """The point from which a run goes on, in this process.

    position: what was saved beside the state; None for a run without a checkpoint. recorded: what of this step is in
    the files already.
    """

    state: TrainState
    position: dict[str, Any] | None
    recorded: Recorded


class Trainer:
    """One run on its way. The methods are the parts of the loop, `loop` puts them together."""

    def __init__(self, run: Run, start: Start) -> None:
        config, self.config, self.workdir, self.backend = run.config, run.config, run.workdir, run.backend
        self.corpus, self.checkpointer, self.writer = run.corpus, run.checkpointer, run.writer
        self.info, self.log, self.beside = run.info, run.log, run.beside
        self.processes, self.placement = run.processes, run.backend.placement
        self.stop_requested = False
        self.train_step, self.eval_step, self.diagnostics_step, self.nonfinite_places = run.programs

        leaves, self.structure = jax.tree.flatten(run.backend.put(start.state))
        self.leaves = tuple(leaves)
        self.step = int(start.state.step)
        position = start.position or {}
        self.tokens_seen: int = position.get("tokens_seen", 0)
        best_loss = position.get("best_validation_loss")
        self.best_loss: float | None = best_loss if best_loss is not None and np.isfinite(best_loss) else None
        self.recorded, self.evaluations = start.recorded, list(start.recorded.evaluations)
        if self.recorded.validation_loss is not None:
            self.note_validation(self.recorded.validation_loss)
        self.stopped_early: str | None = None  # why
        self.elapsed_before: float = position.get("elapsed_seconds", 0.0)

        self.started = time.perf_counter()
        self.clock = PhaseClock()
        self.alerts = Alerts()
        self.pending: collections.deque = collections.deque()  # (step, metrics on the device)
        self.logged_step, self.logged_time = self.step, time.perf_counter()
        self.step_seconds: float | None = None  # the last measured
        self.trace, self.tracing = contextlib.ExitStack(), False  # JAX's profiler, and whether it runs
        self.adapter_size = sum(
            leaf.size for name, leaf in named_leaves(start.state.params).items() if is_adapter(name)
        )
        peak = device_peak_flops(run.backend.device["kind"], self._matmul_kind())
        self.peak_flops = peak and peak * self.placement.share.total  # of all devices, as the tokens a second are

        share = self.placement.share
        self.shape = shape = {
            "block_size": config.model.block_size,
            "batch_size": config.batch_size,
            "targets": config.data.targets,
            "log": run.log,
        }
        self.order = {"seed": config.seed, "targets": config.data.targets}  # what the order of the windows follows from
        if len(self.corpus.train) > 1:
            self.order["weights"] = [round(tokens.weight, 9) for tokens in self.corpus.train]
        self.first_step, self.first_window = self.step, self._windows_seen(position)
        spread = share.total > 1
        self.train_batches = batches.windows(
            self.corpus.train,
            seed=config.seed,
            seen=self.first_window,
            rows=share.rows(config.batch_size, config.accumulate_steps) if spread else None,
            **shape,
        )
        self.validation_batches = {
            tokens.name: batches.evaluation_batches(
                tokens, batches=config.eval.batches, rows=share.rows(config.batch_size) if spread else None, **shape
            )
            for tokens in self.corpus.validation
        }

    def _windows_seen(self, position: dict[str, Any]) -> int:
        """The number of windows of the endless order that the run has had, by the position of its checkpoint."""
        if position.get("order", self.order) != self.order:
            self.log("data: another seed, weights or targets than before: windows are drawn anew, in another order")
            return 0
        return position.get("next_window", self.tokens_seen // self.config.model.block_size)

    def _matmul_kind(self) -> str:
        if self.config.model.dtype == "bfloat16":
            return "bfloat16"
        of_xla = self.backend.name == "xla"  # the precision is of its products only
        return "tf32" if of_xla and self.config.matmul_precision != "highest" else "float32"

    @property
    def state(self) -> TrainState:
        return jax.tree.unflatten(self.structure, self.leaves)

    @property
    def elapsed_seconds(self) -> float:
        """Since the first start of the run, the time between its parts left out."""
        return self.elapsed_before + time.perf_counter() - self.started

    def loop(self, stop: StopSignal) -> signal.Signals | None:
        """Trains to the last step, or to a signal, which is returned.

        Each pass first does what is due after `self.step` updates and then makes one more; the pass after the last
        update only does what is due, so the end is no special case.

        Raises:
          TrainingFailed: too many steps in a row were skipped.
          StorageError: a file could not be written.
        """
        config = self.config
        loader = batches.loader(self.train_batches, prefetch=config.data.prefetch)
        with contextlib.closing(loader) as loaded, self.trace:
            while True:
                # Read once: a signal that comes while this pass does what is due ends the next one, which saves.
                last, (stopping, asked) = self.step >= config.num_steps, self.requests(stop)
                self.run_due_actions(last=last, stopping=stopping, asked=asked)
                if last or stopping:
                    return self.stopped_by(stop, stopping)
                self.stopped_early = why_stop(self.evaluations, config.eval.patience)
                if self.stopped_early:
                    self.run_due_actions(last=True, stopping=False, asked=False)
                    return None
                with self.clock.phase("data"):
                    batch = next(loaded)
                if self.processes.is_first:
                    self.profile(batch)
                batch = self.placement.batch(batch, config.accumulate_steps)
                self.leaves, device_metrics = self.train_step(self.leaves, batch)
                jax.tree.map(lambda leaf: leaf.copy_to_host_async(), device_metrics)
                self.step += 1
                if self.step == self.first_step + 1:
                    self.note_operations(batch)
                self.recorded = NOTHING
                self.tokens_seen += config.batch_size * config.model.block_size
                self.pending.append((self.step, device_metrics))
                self.read_back(READ_BACK_LAG)

    def requests(self, stop: StopSignal) -> tuple[bool, bool]:
        """Whether this pass ends the run before its last step, and whether it saves, because a signal asks for it.

        Of several processes, process 0 announces the step at which all do so.
        """
        channel = self.processes.channel
        if channel is None:
            return stop.received is not None, stop.take_save_request()
        if stop.received is not None and not self.stop_requested:
            self.stop_requested = True
            channel.request("stop")
        if stop.take_save_request():
            channel.request("save")
        for what in channel.take_requests():
            channel.announce(what, self.step + LEAD)
        return channel.is_time_to("stop", self.step), channel.is_time_to("save", self.step)

    def stopped_by(self, stop: StopSignal, stopping: bool) -> signal.Signals | None:
        """The signal that ended the run, on all processes the same."""
        if self.processes.count == 1:
            return stop.received
        number = self.processes.share(int(stop.received or signal.SIGTERM))
        return signal.Signals(number) if stopping else None

    def run_due_actions(self, *, last: bool, stopping: bool, asked: bool) -> None:
        """Checkpoint, then evaluation, diagnostics and samples, where they are due; and a checkpoint where the
        evaluation, after step 0, is the best of all that have one.

        The checkpoint goes first: nothing that fails, prints or takes long may cost it. What a run that stops or dies
        then leaves out of the rest, it makes up for when it is resumed.
        """
        config, step = self.config, self.step
        self.checkpointer.check()
        if self.checkpointer.newest not in (None, self.info.fields.get(LAST_CHECKPOINT)):
            self.info.update(**{LAST_CHECKPOINT: self.checkpointer.newest})
        due = {
            "checkpoint": (step > 0 and is_due(step, config.checkpoint.every)) or last or stopping or asked,
            "eval": is_due(step, config.eval.every, last),
            "diagnostics": is_due(step, config.log.diagnostics_every, last),
            "sample": (step > 0 or last) and is_due(step, config.sample.every, last),
        }
        if not any(due.values()):
            return
        self.read_back(0)
        jax.block_until_ready(self.leaves)
        if due["checkpoint"]:
            with self.clock.phase("checkpoint"):
                self.save()
            if asked:
                self.log(f"step {step:>6}  saved, as SIGUSR1 asked")
        if stopping:
            return
        loss = self.recorded.validation_loss
        if due["eval"] and loss is None:
            with self.clock.phase("eval"):
                loss = self.evaluate()
        if loss is not None:
            if step > 0 and not due["checkpoint"] and self.processes.share(self.checkpointer.would_be_best(loss)):
                with self.clock.phase("checkpoint"):
                    self.save()
            self.checkpointer.mark(step, loss)
        if due["diagnostics"] and "diagnostics" not in self.recorded.parts:
            with self.clock.phase("diagnostics"):
                self.diagnose()
        if due["sample"] and self.recorded.samples < len(config.sample.prompts):
            with self.clock.phase("sample"):
                self.sample()

    def read_back(self, lag: int) -> None:
        """Writes the metrics of all steps but the newest `lag`, and stops a run that only skips."""
        while len(self.pending) > lag:
            step, device_metrics = self.pending.popleft()
            values = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
            if is_due(step, self.config.log.every, step - self.first_step in EARLY_LINES):
                values |= self.progress(step, values)
            self.writer.write(step, "train", values)
            self.tell(self.alerts.see(step, "train", values))
            if not values["finite"]:
                self.report_skipped(step, values)

    def tell(self, alerts: Iterable[Alert]) -> None:
        """Logs alerts, but of skipped updates, of which `report_skipped` says more, and shows them in trackers.

        Readers of the metrics find them anew.
        """
        for alert in alerts:
            self.writer.alert(*alert)
            if alert.rule != NON_FINITE:
                self.log(str(alert))

    def progress(self, step: int, values: dict[str, Any]) -> dict[str, float]:
        """Prints the progress line; returns what it measured since the last one."""
        self.writer.check_in_place()
        now = time.perf_counter()
        phases = self.clock.take()
        data_seconds = phases.pop("data", 0.0)
        steps, compiled = step - self.logged_step, self.logged_step == self.first_step
        seconds = max(now - self.logged_time - sum(phases.values()), 1e-9) / steps
        self.logged_step, self.logged_time, self.step_seconds = step, now, seconds
        tokens_per_second = self.config.batch_size * self.config.model.block_size / seconds
        measured = {
            "step_ms": 1e3 * seconds,
            "data_ms": 1e3 * data_seconds / steps,
            "tokens_per_second": tokens_per_second,
        }
        if not compiled:  # of such a step nothing follows for the others
            measured["eta_seconds"] = (self.config.num_steps - step) * seconds
        measured |= in_ms(phases) | self.placement.measures()
        mfu = model_flops_utilisation(self.config.model, tokens_per_second, self.peak_flops, self.adapter_size)
        if mfu is not None:
            measured["mfu"] = mfu
        memory = {"host_peak_bytes": host_peak_bytes(), "device_peak_bytes": self.backend.peak_bytes()}
        measured |= {name: count for name, count in memory.items() if count is not None}
        self.log(
            f"step {step:>6}/{self.config.num_steps}  loss {values['loss']:.4f}  grad {values['grad_norm']:.2f}  "
            f"lr {values['learning_rate']:.2e}  {measured['step_ms']:.1f} ms  {tokens_per_second:,.0f} tok/s  "
            f"{'' if mfu is None else f'MFU {mfu:.1%}  '}"
            + ("compiled in it" if compiled else f"ETA {format_seconds(measured['eta_seconds'])}")
        )
        return measured

    def end(self, text: str) -> None:
        """Waits for the last checkpoint; records the end, with the phases since the last progress line."""
        with self.clock.phase("checkpoint"):
            self.checkpointer.wait()
        phases = self.clock.take()
        phases.pop("data", None)  # part of the steps
        self.writer.write(self.step, "event", {"text": text, **in_ms(phases)})

    def report_skipped(self, step: int, values: dict[str, Any]) -> None:
        """Says which step and layer went wrong; raises TrainingFailed after too many in a row."""
        params = self.placement.own(self.state.params)
        found = self.nonfinite_places(params, self.whole_batches[step - 1 - self.first_step])
        places = [place for place, nonfinite in found.items() if nonfinite]
        # Backward, a bad value spreads towards the input: the layer nearest the output is where it began.
        names = ModelConfig.from_config(self.config.model).layer_names
        layers = [layer for layer in names if not np.isfinite(values.get(f"grad_norm/{layer}", 0))]
        place = (places or [f"gradient of {layer}" for layer in reversed(layers)] or ["gradient norm"])[0]
        text = (
            f"step {step}: update skipped, {place} is not finite "
            f"(loss {values['loss']}, gradient norm {values['grad_norm']})"
        )
        self.log(text)
        self.writer.write(step, "event", {"text": text})
        if values["skipped_in_a_row"] >= self.config.max_skipped_steps:
            raise TrainingFailed(f"{text}; {values['skipped_in_a_row']} in a row, so the run stops")

    def evaluate(self) -> float:
        """Mean loss over the first batches of the validation split, the same ones each time; of several sources the
        mean by their weights."""
        start = time.perf_counter()
        losses = {source: self.evaluate_on(dataset) for source, dataset in self.validation_batches.items()}
        loss = math.fsum(losses[tokens.name] * tokens.weight for tokens in self.corpus.validation)
        best = self.note_validation(loss)
        self.evaluations.append(Evaluation(self.step, loss))
        self.recorded = dataclasses.replace(self.recorded, validation_loss=loss)
        several = losses if len(losses) > 1 else {}
        self.writer.write(
            self.step,
            "validation",
            {"loss": loss, "best": best, "seconds": time.perf_counter() - start}
            | {f"{LOSS_OF}{source}": value for source, value in several.items()},
        )
        self.log(f"step {self.step:>6}  validation loss {loss:.4f}{' (best so far)' if best else ''}")
        self.tell(self.alerts.see(self.step, "validation", {"loss": loss}))
        for source, value in several.items():
            self.log(f"             {value:.4f} on {source}")
        return loss

    def evaluate_on(self, validation_batches: Iterable[Batch]) -> float:
        """Mean loss over batches."""
        params = self.state.params
        sums = [self.eval_step(params, self.placement.batch(batch)) for batch in validation_batches]
        total, count = self.placement.total(np.sum(jax.device_get(sums), axis=0, dtype=np.float64))
        return float(total / count)

    def note_validation(self, loss: float) -> bool:
        """Whether a validation loss is the lowest so far, which it is from here on."""
        best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if best:
            self.best_loss = loss
        return best

    def diagnose(self) -> None:
        """Records the largest attention score and the entropy of each head, on the first validation batch."""
        params = self.placement.own(self.state.params)
        self.recorded = dataclasses.replace(self.recorded, parts=self.recorded.parts | {"diagnostics"})
        if not self.processes.is_first:
            return
        statistics = jax.device_get(self.diagnostics_step(params, self.whole_validation_batch))
        values = {
            f"{name}/head_{head}": float(value)
            for name, heads in statistics.items()
            for head, value in enumerate(heads)
        }
        self.writer.write(self.step, "diagnostics", values)

    @functools.cached_property
    def whole_batches(self) -> Any:
        """The batches of `train_batches` with the rows of all processes."""
        if self.placement.share.total == 1:
            return self.train_batches
        return batches.windows(self.corpus.train, seed=self.config.seed, seen=self.first_window, **self.shape)

    @functools.cached_property
    def whole_validation_batch(self) -> Batch:
        """The first validation batch, with the rows of all processes."""
        if self.placement.share.total == 1:
            return next(iter(self.validation_batches.values()))[0]
        return batches.evaluation_batches(self.corpus.validation[0], batches=1, **self.shape)[0]

    @functools.cached_property
    def decoder(self) -> Decoder:
        """A decoder for the config's prompts, without parameters."""
        slots = min(len(self.config.sample.prompts), MOST_SAMPLES)
        return Decoder(make_model(self.config), None, self.backend, slots=slots)

    def sample(self) -> None:
        """Answers the config's prompts, to log and file, but those whose answers are there already."""
        config = self.config.sample
        start = time.perf_counter()
        params = self.placement.own(self.state.params)
        if not self.processes.is_first:
            self.recorded = dataclasses.replace(self.recorded, samples=len(config.prompts))
            return
        self.decoder.load(params)
        seeds = np.random.SeedSequence([self.config.seed, SAMPLING, self.step]).generate_state(len(config.prompts))
        drawn = SamplingOptions.from_config(self.config)
        answers = answer(
            self.decoder,
            self.corpus.tokenizer,
            [[Turn("user", prompt)] for prompt in config.prompts],
            [dataclasses.replace(drawn, seed=int(seed)) for seed in seeds],
        )
        seconds = (time.perf_counter() - start) / max(len(answers), 1)
        for prompt, sample in list(zip(config.prompts, answers, strict=True))[self.recorded.samples :]:
            self.writer.sample(
                self.step, prompt, sample.text, tokens=sample.tokens, seconds=seconds, ended=sample.ended
            )
            self.log(f"step {self.step:>6}  {prompt}\n             -> {sample.text}")
        self.recorded = dataclasses.replace(self.recorded, samples=len(answers))

    def save(self) -> None:
        """Starts writing a checkpoint, once all that led to it is on disk."""
        self.writer.flush()
        with contextlib.suppress(OSError):  # the folder is gone: the checkpoint's own error says so
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in self.leaves)
            found = self.alerts.see_disk(self.step, shutil.disk_usage(self.workdir).free, size)
            for alert in found:  # it follows from no metric
                self.writer.write(self.step, "event", {"text": alert.text, "rule": alert.rule})
            self.tell(found)
        position = {
            "next_window": self.first_window + (self.step - self.first_step) * self.config.batch_size,
            "order": self.order,
            "tokens_seen": self.tokens_seen,
            "elapsed_seconds": self.elapsed_seconds,
            "best_validation_loss": self.best_loss,
            "data_fingerprint": self.corpus.fingerprint,
            **self.beside,
        }
        self.leaves = tuple(jax.tree.leaves(self.placement.settle(self.state, self.step)))
        self.checkpointer.save(self.step, self.placement.whole(saved_part(self.state, self.config)), position)

    def profile(self, batch: Batch) -> None:
        """Traces the steps that the config names: all of them by JAX's profiler, or the first by Vulkan's clock."""
        first, count = self.config.log.profile_step, self.config.log.profile_steps
        step, folder = self.step + 1, self.workdir / PROFILE
        in_window = 0 < first <= step < first + count
        if self.backend.name == "vulkan":
            if step == first:
                with self.clock.phase("profile"), writing(folder):
                    profile = self.train_step.profile(self.leaves, batch)  # runs it one dispatch at a time, on copies
                    folder.mkdir(exist_ok=True)
                    profile.write_trace(folder / "trace.json")
                    (folder / "dispatches.txt").write_text(f"{profile}\n")
                    self.write_floors(batch)
                self.log(f"device time of step {first}, {1e3 * profile.seconds:.3f} ms, by dispatch: {folder}")
        elif in_window != self.tracing:
            jax.block_until_ready(self.leaves)
            self.trace.close()
            self.tracing = in_window
            if in_window:  # a run that was resumed in the window begins there
                self.trace.callback(self.log, f"trace from step {step} on: {folder}")
                self.trace.enter_context(jax.profiler.trace(str(folder)))

    def note_operations(self, batch: Batch) -> None:
        """Saves what a step's program is made of, which Vulkan knows from the first step on."""
        if self.backend.name == "vulkan":
            self.info.update(operations=dataclasses.asdict(self.train_step.cost(self.leaves, batch)))

    def write_floors(self, batch: Batch) -> None:
        """Stores the dispatches of the next step beside their floors, if the device has the memory to measure these."""
        from vk_kernels.runtime.open_devices import open_device  # here: no other backend needs them
        from vk_kernels.tools.floors import profile_with_floors

        model = self.config.model
        heads = (batch["inputs"].shape[0] // self.config.accumulate_steps, model.block_size, 1, model.embed_dim)
        try:
            found = profile_with_floors(self.train_step, (self.leaves, batch), open_device(), model.dtype, heads)
        except MemoryError as error:  # of the operands of a large copy and product; the run itself has what it needs
            self.log(f"no kernels beside their floors: {describe(error)}")
            return
        write_json(self.workdir / PROFILE_FILE, {"step": self.step + 1, **found})


def is_due(step: int, every: int, anyway: bool = False) -> bool:
    """Whether what is done every so many steps, or `anyway`, is done after `step`; with every = 0 it never is."""
    return every > 0 and (anyway or step % every == 0)


def in_ms(phases: dict[str, float]) -> dict[str, float]:
    """PHASE_ms, as metrics.jsonl has it, from seconds by phase."""
    return {f"{name}_ms": 1e3 * seconds for name, seconds in phases.items()}


def format_seconds(seconds: float) -> str:
    """Writes 1h02m03s, without leading zero parts."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m{seconds:02}s"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
