"""A run from its config to its last step: made, or read from its folder with what changed told, and trained."""

import contextlib
import functools
import json
import os
import shlex
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gpt_jax.backend import Backend, describe, enter_backend, is_device_error
from gpt_jax.checkpoint import Checkpointer
from gpt_jax.config import leaves, validate, with_defaults
from gpt_jax.data import batches, token_cache
from gpt_jax.data.names import TOKENIZER_FILE
from gpt_jax.data.tokenizer import load as load_tokenizer
from gpt_jax.data.tokenizer import save as save_tokenizer
from gpt_jax.distributed.channel import SAVING
from gpt_jax.distributed.processes import ALONE, Processes
from gpt_jax.leaf_names import named_leaves
from gpt_jax.log import Log
from gpt_jax.model.lora import unused_settings
from gpt_jax.model.parameters import listing, merge_parameters
from gpt_jax.runs.folder import REPORT, open_folder
from gpt_jax.runs.info import CONFIG_FILE, INFO_FILE, RunInfo, mark_failed, new_run_id, read_config, write_json
from gpt_jax.runs.metrics import METRICS_FILE, MetricsWriter
from gpt_jax.runs.report import write_report
from gpt_jax.runs.trackers import open_trackers, settings_of
from gpt_jax.runs.webhook import SETTING, is_hidden, public_url, resolve
from gpt_jax.signals import StopSignal
from gpt_jax.storage.checkpoint_files import CHECKPOINTS, saved_steps
from gpt_jax.storage.files import StorageError, writing
from gpt_jax.training import adapters, finetune
from gpt_jax.training.donor import find_donor, forget_donor
from gpt_jax.training.failures import TrainingFailed, remedies
from gpt_jax.training.follower import SilentCheckpointer, SilentInfo, SilentWriter, silent
from gpt_jax.training.fresh_state import abstract_state, begin_compiling, fresh_state
from gpt_jax.training.history import (
    LAST_CHECKPOINT,
    NOTHING,
    STOPPED_EARLY,
    Recorded,
    check_history,
    lost_work,
    read_recorded,
    recorded_from_json,
    recorded_to_json,
)
from gpt_jax.training.open_settings import fill_in
from gpt_jax.training.optimizer import last_decay_step, learning_rate_schedule
from gpt_jax.training.preflight import check_start
from gpt_jax.training.programs import plan_programs
from gpt_jax.training.steps import TrainState
from gpt_jax.training.trainable import rates_of_parameters, trained_parameters
from gpt_jax.training.trainer import Run, Start, Trainer
from vk_kernels import LinkError


def train_and_evaluate(
    config: ConfigDict,
    workdir: Path | None = None,
    *,
    began: float | None = None,
    config_file: dict[str, Any] | None = None,
    processes: Processes = ALONE,
) -> signal.Signals | None:
    """Runs a config from where its folder stands to its last step.

    Args:
      config: see configs/chat.py.
      workdir: the run's folder; None makes a new one, runs/RUN_ID.
      began: when the start of the run began, of `time.perf_counter`; None: now.
      processes: of the run, this one among them; all of them call this.
      config_file: as `config_file.describe_changes` gives it, for run.json; None: the config is of no file.

    Returns:
      The signal that ended the run early, after its state was saved; None if it is complete.

    Raises:
      UserError: the config, the data, a checkpoint or the folder cannot be used.
      TrainingFailed: too many steps in a row had a non-finite loss or gradient; the device failed, or memory ran out.
    """
    began = time.perf_counter() if began is None else began
    config = fill_in(config, workdir)
    validate(config)
    run_id = new_run_id()
    workdir = Path("runs") / run_id if workdir is None else workdir
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        settings = config.backend, config.matmul_precision, stack, config.vulkan.submit_ms
        backend = enter_backend(*settings, processes, config.shard)
        processes.agree({"the backend": backend.name})
        backend.placement.share.check_batch(config.batch_size, config.accumulate_steps)
        if not processes.is_first:
            return follow(config, processes, backend, stop)
        saved = check_start(config, workdir, abstract_state(config))
        if saved is None:
            begin_compiling(config)
        webhook, config.log.webhook = resolve(config.log.webhook), public_url(config.log.webhook)  # it may be a secret
        programs, shortage = plan_programs(config, backend)  # what kernels cannot do is said before any work
        stop.check()
        log = stack.enter_context(open_folder(workdir))
        check_history(workdir, log)
        log(f"run folder {workdir}\nbackend {backend}{of_processes(processes)}")
        failure = stack.enter_context(DeviceFailure(config, workdir, backend, processes))
        if shortage is not None:
            raise failure.ended_by(shortage)
        kept = finetune.tokenizer_to_keep(config, workdir)
        processes.share(processes.count > 1 and {"saved": saved, "kept": text_of_tokenizer(kept)})
        corpus = open_corpus(config, workdir, kept, saved, log)
        if processes.count > 1:
            processes.agree(hashes_of(corpus))
        stop.check()
        checkpointer = stack.enter_context(
            Checkpointer(
                workdir / CHECKPOINTS,
                keep_last=config.checkpoint.keep_last,
                keep_every=config.checkpoint.keep_every or None,
            )
        )
        state, position = initial_state(config, checkpointer, corpus.tokenizer, log)
        stop.check()

        # Only now is it certain that this config and data are those of the folder: from here on it is written to.
        resume_step = None if position is None else int(state.step)
        beside = adapters.position_of_adapters(config, state, position, workdir)
        info = RunInfo(
            workdir,
            spent_seconds=0.0 if position is None else position["elapsed_seconds"],
            began=began,
            **facts(config, backend, corpus, state, from_donor=kept is not None),
            **facts_of_processes(processes, config),
            config_file=config_file,
            **{LAST_CHECKPOINT: resume_step},
            **({} if (workdir / INFO_FILE).exists() else {"run_id": run_id}),
        )
        # What they show at their end is how the run ended, so they are open longer than it.
        trackers = stack.enter_context(open_trackers(config, workdir, info.run_id, webhook, log))
        stack.push(functools.partial(finish_if_failed, info, checkpointer))
        processes.when_lost(functools.partial(note_lost_process, info, checkpointer))
        if position is not None:
            tell_schedule(config, workdir, state, log)
        tell_unused(config, webhook, log)
        save_config(config, workdir, log)
        with writing(workdir / TOKENIZER_FILE):
            save_tokenizer(corpus.tokenizer, workdir / TOKENIZER_FILE)
        log(f"parameters\n{parameter_table(state.params, config)}")
        lost = lost_work(workdir, resume_step)  # before its records are dropped
        shown = {"settings": settings_of(config), "trackers": trackers}
        writer = stack.enter_context(MetricsWriter(workdir, resume_step, config.log.tensorboard, **shown))
        recorded, text = take_up(workdir, resume_step, log)
        start_seconds = time.perf_counter() - began
        writer.write(resume_step or 0, "event", {"text": text, "start_seconds": start_seconds, **lost})
        run = Run(config, workdir, backend, programs, corpus, checkpointer, writer, info, log, beside, processes)
        processes.share({"position": position, "recorded": recorded_to_json(recorded)})
        trainer = Trainer(run, Start(backend.placement.broadcast(state), position, recorded))
        failure.trainer = trainer
        stop.defer()
        stopped_by = trainer.loop(stop)
        finish(run, trainer, stopped_by)
        return stopped_by


def follow(config: ConfigDict, processes: Processes, backend: Backend, stop: StopSignal) -> signal.Signals | None:
    """The part of a process beside process 0: what it computes is the same, and its own is nothing but its data.

    What `train_and_evaluate` shares, this takes, in the same order.
    """
    programs, _ = plan_programs(config, backend)
    with DeviceFailure(config, None, backend, processes) as failure:
        start = processes.share()
        kept = start["kept"] and Tokenizer.from_str(start["kept"])
        corpus = open_corpus(config, None, kept, start["saved"], silent)
        processes.agree(hashes_of(corpus))
        told = processes.share()
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_state(config))
        state = backend.placement.broadcast(zeros)
        silenced = SilentCheckpointer(), SilentWriter(), SilentInfo(), silent
        run = Run(config, Path(os.devnull), backend, programs, corpus, *silenced, {}, processes)
        trainer = Trainer(run, Start(state, told["position"], recorded_from_json(told["recorded"])))
        failure.trainer = trainer
        stop.defer()
        return trainer.loop(stop)


def of_processes(processes: Processes) -> str:
    """Says in the log how many processes there are, where there are several."""
    if processes.count == 1:
        return ""
    return f", {processes.count} processes on {processes.host_count} host{'s' if processes.host_count > 1 else ''}"


def facts_of_processes(processes: Processes, config: ConfigDict) -> dict[str, Any]:
    """The processes of a run, for run.json; nothing of one."""
    if processes.count == 1:
        return {}
    return {"processes": {"count": processes.count, "hosts": sorted(set(processes.hosts)), "shard": config.shard}}


def text_of_tokenizer(kept: Tokenizer | Path | None) -> str | None:
    """A tokenizer as its file has it, for processes that do not see the file."""
    return kept and (kept if isinstance(kept, Tokenizer) else load_tokenizer(kept)).to_str()


def hashes_of(corpus: token_cache.Corpus) -> dict[str, Any]:
    """Names and hashes of the data, by which processes see that all train on the same."""
    tokenizer = zlib.crc32(corpus.tokenizer.to_str().encode())
    return {"the data's fingerprint": corpus.fingerprint, "the checksum of the tokenizer": tokenizer}


def note_lost_process(info: RunInfo, checkpointer: Checkpointer, line: str) -> str:
    """Marks a run that another process's loss ends, once the checkpoint that is being written is whole; says how to go
    on. Runs in the thread that watches."""
    checkpointer.settle(SAVING)
    with contextlib.suppress(StorageError):
        info.finish("failed", **{LAST_CHECKPOINT: checkpointer.newest})
    return f"{line}; {how_to_go_on(info.folder)}"


def how_to_go_on(workdir: Path) -> str:
    """Says which checkpoint a run that has failed goes on from."""
    if steps := saved_steps(workdir / CHECKPOINTS):
        return f"the last checkpoint is of step {max(steps)}, --workdir={workdir} goes on from it"
    return "no checkpoint was written yet"


def finish(run: Run, trainer: Trainer, stopped_by: signal.Signals | None) -> None:
    """Ends a run in order: everything on disk, its status in run.json, its report."""
    early = f"stopped early: {trainer.stopped_early}" if trainer.stopped_early else ""
    trainer.end(f"stopped by {stopped_by.name}" if stopped_by else early or "completed")
    run.writer.flush()
    status = "interrupted" if stopped_by else "completed"
    facts = {STOPPED_EARLY: trainer.stopped_early} if early else {}
    run.info.finish(status, peak_flops=trainer.peak_flops, **facts, **{LAST_CHECKPOINT: run.checkpointer.newest})
    if stopped_by:
        command = f"python -m gpt_jax.main --workdir={shlex.quote(str(run.workdir))}"
        run.log(f"stopped by {stopped_by.name} at step {trainer.step}, saved; {command} goes on")
    elif early:
        best = run.checkpointer.best_step()
        run.log(f"step {trainer.step}: {early}" + ("" if best is None else f"; the best checkpoint is of step {best}"))
    with writing(run.workdir / f"{REPORT}.md"):
        run.log(f"report: {write_report(run.workdir)}")
    if not stopped_by:
        run.log(f"talk to it: python -m gpt_jax.chat {shlex.quote(str(run.workdir))}")


def open_corpus(
    config: ConfigDict,
    workdir: Path | None,
    kept_tokenizer: Tokenizer | Path | None,
    saved: dict[str, Any] | None,
    log: Log,
) -> token_cache.Corpus:
    """The data of a run.

    workdir: its folder; None for a process that has none. saved: the position beside its checkpoint, whose data it must
    be.
    """
    expected = None if saved is None else saved["data_fingerprint"]
    corpus = token_cache.prepare(config.data, config.model.vocab_size, log, kept_tokenizer, expected)
    if saved is not None and workdir is not None:
        finetune.check_same_tokenizer(workdir, corpus.tokenizer)
    batches.check_windows(corpus, config.model.block_size, config.data.targets)
    return corpus


def initial_state(
    config: ConfigDict, checkpointer: Checkpointer, tokenizer: Tokenizer, log: Log
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state to go on from, on JAX's default device, and the position saved with it: the run's own checkpoint if it
    has one, else the parameters of `init_from` with a fresh optimizer, else fresh parameters."""
    abstract = abstract_state(config)
    restored = checkpointer.restore_latest(adapters.saved_part(abstract, config))
    if restored is not None:
        log(f"initialised from this run's checkpoint at step {restored.step}")
        state = adapters.whole_state(restored.state, restored.position, abstract.params, checkpointer.run)
        return state, restored.position
    if not config.init_from:
        log(f"initialised from scratch with seed {config.seed}")
        return fresh_state(config), None
    donor, description = find_donor(config.init_from, config.data.tokenizer).read_parameters()
    fresh = fresh_state(config)
    donor, moved = finetune.map_token_rows(donor, fresh.params, config, tokenizer)
    known = len(donor.get("wpe", ()))
    donor, cut = finetune.fit_positions(donor, fresh.params)
    params, report = merge_parameters(fresh.params, donor)
    if config.lora.rank:
        adapters.check_donor_is_whole(report, config.model.block_size, known)
    forget_donor()
    log("\n".join(filter(None, (f"initialised from {description}", str(report), moved, cut))))
    return fresh.replace(params=params), None  # the optimizer's state has nothing of the parameters' values


def tell_unused(config: ConfigDict, webhook: str, log: Log) -> None:
    """Warns of settings that do nothing. webhook: the address that alerts are posted to, '' where it is not known."""
    if not webhook and is_hidden(config.log.webhook):
        log(f"config.{SETTING}: the rest of {config.log.webhook} was not saved: give it again to have alerts posted")
    if unused := unused_settings(config):
        log(f"warning: config.{listing(unused)} does nothing: config.lora.rank is 0, so all parameters are trained")


def facts(
    config: ConfigDict, backend: Backend, corpus: token_cache.Corpus, state: TrainState, from_donor: bool
) -> dict[str, Any]:
    """The device, the model and the data of a run, for run.json."""
    return {
        "name": config.name,
        "domain": config.domain,
        "backend": str(backend),
        "device": backend.device,
        "peak_bytes": backend.peak_bytes,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "trained_parameters": trained_size(state.params, config),
        "vocabulary": corpus.tokenizer.get_vocab_size(),
        "tokenizer": finetune.FROM_DONOR if from_donor else config.data.tokenizer or "trained",
        "data": corpus.stats,
        **({"data_by_source": corpus.by_source} if len(corpus.by_source) > 1 else {}),
    }


def take_up(workdir: Path, step: int | None, log: Log) -> tuple[Recorded, str]:
    """Reads what is recorded of the step that a run goes on from; says how it starts, and what is missing before."""
    if step is None:
        return NOTHING, "started"
    recorded = read_recorded(workdir, step)
    text = f"resumed from {step}"
    if recorded.last_step < step:
        text += f"; {METRICS_FILE} ends at step {recorded.last_step}, what came between is not in it"
        log(f"warning: {text}")
    return recorded, text


class DeviceFailure:
    """Turns what a device raises into a TrainingFailed whose line says what happened and how to go on.

    Entered before all that closes files and marks the run, so that these are done when the line is made.
    """

    def __init__(self, config: ConfigDict, workdir: Path | None, backend: Backend, processes: Processes) -> None:
        self._config, self._workdir, self._backend, self._processes = config, workdir, backend, processes
        self.trainer: Trainer | None = None  # once there is one

    def __enter__(self) -> "DeviceFailure":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if (
            error is not None
            and self._processes.count > 1
            and isinstance(error, jax.errors.JaxRuntimeError | LinkError)
        ):
            self._processes.blame()  # an exchange fails first of all where another process is lost
        if error is None or not is_device_error(error):
            return
        step, seconds = (None, None) if self.trainer is None else (self.trainer.step, self.trainer.step_seconds)
        text = f"{describe(error)}; {remedies(error, self._config, seconds)}"
        raise self.ended_by(text if step is None else f"step {step}: {text}") from error

    def ended_by(self, text: str) -> TrainingFailed:
        """The error to raise for a run that is marked as failed by then, whether it had begun or not.

        A folder that was removed in the meantime is not made again.
        """
        names = {"name": self._config.name, "domain": self._config.domain, "backend": str(self._backend)}
        if self._workdir is None:
            return TrainingFailed(text)
        if not self._workdir.is_dir():
            return TrainingFailed(f"{text}; {self._workdir} is gone, and what was saved in it")
        mark_failed(self._workdir, device=self._backend.device, peak_bytes=self._backend.peak_bytes, **names)
        return TrainingFailed(f"{text}; {how_to_go_on(self._workdir)}")


def finish_if_failed(info: RunInfo, checkpointer: Checkpointer, error: type[BaseException] | None, *_: object) -> None:
    """Marks a run that an exception ends, where the disk still takes that."""
    if error is not None:
        with contextlib.suppress(StorageError):  # the exception that is on its way says more
            status = "interrupted" if issubclass(error, KeyboardInterrupt) else "failed"
            info.finish(status, **{LAST_CHECKPOINT: checkpointer.newest})


def tell_schedule(config: ConfigDict, workdir: Path, state: TrainState, log: Log) -> None:
    """Says which learning rates come next, where the config that the run had until now has others."""
    before = with_defaults(read_config(workdir))
    names = ("num_steps", *(name for name in before if name.startswith("optimizer.")))
    if any(before[name] is None for name in names):
        return
    former = ConfigDict({"optimizer": {}, "num_steps": 0})
    former.unlock().update_from_flattened_dict({name: before[name] for name in names})
    count = int(state.step) - int(state.skipped)
    rates = [float(learning_rate_schedule(each)(count)) for each in (config, former)]
    ends = [last_decay_step(each) for each in (config, former)]
    if rates[0] != rates[1] or ends[0] != ends[1]:
        log(
            f"learning rate: {rates[0]:.3g} from here on, {rates[1]:.3g} by the schedule of before; the minimum, "
            f"{config.optimizer.min_learning_rate:.3g}, comes at step {ends[0]:,}, before it was step {ends[1]:,}"
        )


def save_config(config: ConfigDict, workdir: Path, log: Log) -> None:
    """Writes config.json, and tells what differs from the config that the run had until now."""
    earlier = read_config(workdir)
    before = json.loads(json.dumps(with_defaults(earlier))) | dict(leaves(earlier)) if earlier else {}
    saved = json.loads(config.to_json_best_effort()) | {"distributed": ""}  # of a start, and not of the run
    now = dict(leaves(saved))
    for name in sorted(before.keys() | now.keys()) if before else ():
        if before.get(name) != now.get(name):
            log(f"config.{name} was {before.get(name)!r}, now {now.get(name)!r}")
    write_json(workdir / CONFIG_FILE, saved)


def parameter_table(params: Any, config: ConfigDict) -> str:
    """Name, shape and size of each parameter, how it is trained if not as all are, and the total."""
    is_trained, rate = trained_parameters(config), rates_of_parameters(config)
    leaves = named_leaves(params)
    width = max(map(len, leaves))

    def note(name: str) -> str:
        if not is_trained(name):
            return "  frozen"
        return "" if rate(name) == 1 else f"  rate x {rate(name):.3g}"

    rows = [f"  {name:<{width}}  {leaf.shape!s:<14} {leaf.size:>12,}{note(name)}" for name, leaf in leaves.items()]
    total, trained = sum(leaf.size for leaf in leaves.values()), trained_size(params, config)
    rows.append(f"  {'total':<{width}}  {'':<14} {total:>12,}")
    return "\n".join(rows if trained == total else [*rows, f"  {'trained':<{width}}  {'':<14} {trained:>12,}"])


def trained_size(params: Any, config: ConfigDict) -> int:
    """The number of values that are trained."""
    is_trained = trained_parameters(config)
    return sum(leaf.size for name, leaf in named_leaves(params).items() if is_trained(name))
