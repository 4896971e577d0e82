"""Settings that a config leaves open come from the donor or from the run that goes on; the short command that does."""

import json

import pytest
from absl import flags

from configs import chat_tiny, finetune
from gpt_jax import main
from gpt_jax.cli import parse_flags
from gpt_jax.config import FIELDS, validate, with_defaults
from gpt_jax.config_file import define_config_flag, load_config
from gpt_jax.data import tokenizer as tk
from gpt_jax.errors import UserError
from gpt_jax.main import config_of_run
from gpt_jax.runs.info import write_json
from gpt_jax.training.early_stopping import Evaluation, why_stop
from gpt_jax.training.history import why_complete
from gpt_jax.training.open_settings import fill_in, follow_num_steps, reads_hugging_face


def write_run(folder, steps=(100,), status="interrupted", validation=(), **changes):
    """A run's folder without parameters."""
    config = chat_tiny.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", json.loads(config.to_json_best_effort()))
    write_json(folder / "run.json", {"status": status, "last_checkpoint": max(steps, default=None)})
    lines = [{"step": step, "split": "validation", "loss": loss} for step, loss in validation]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def donor(tmp_path):
    return write_run(tmp_path / "donor", model__num_layers=3, model__vocab_size=300, model__soft_cap=5.0)


def finetuning(donor, **changes):
    config = finetune.get_config()
    config.init_from = str(donor)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


@pytest.mark.parametrize("place", ["", "/checkpoints/100", "@100", "@latest"])
def test_the_model_is_the_donors_wherever_in_the_run_is_pointed_to(donor, tmp_path, place):
    filled = fill_in(finetuning(f"{donor}{place}"), tmp_path / "new")
    model = json.loads((donor / "config.json").read_text())["model"]
    assert json.loads(filled.model.to_json_best_effort()) == model
    validate(filled)
    assert filled.init_from == str(donor if not place else donor / "checkpoints" / "100")
    assert not (tmp_path / "new").exists()


def test_some_settings_may_be_others_than_the_donors(donor):
    changes = {"block_size": 64, "dropout_rate": 0.3, "dtype": "bfloat16", "remat": True, "soft_cap": 0.0}
    filled = fill_in(finetuning(donor, **{f"model__{name}": value for name, value in changes.items()}), None)
    assert {name: filled.model[name] for name in changes} == changes
    assert filled.model.num_layers == 3


def test_another_tokenizer_has_a_vocabulary_of_its_own_size(donor, tmp_path):
    words = tk.train_tokenizer(["kettle lamp river bridge kettle lamp"] * 3, 280)
    tk.save(words, tmp_path / "words.json")
    file = str(tmp_path / "words.json")
    assert fill_in(finetuning(donor, data__tokenizer=file), None).model.vocab_size == words.get_vocab_size()
    tk.save(words, donor / "tokenizer.json")
    assert fill_in(finetuning(donor, data__tokenizer=file), None).model.vocab_size == 300  # the same: nothing moves
    assert fill_in(finetuning(donor, data__tokenizer="new"), None).model.vocab_size == 300
    assert fill_in(finetuning(donor, data__tokenizer="new", model__vocab_size=500), None).model.vocab_size == 500


MISTAKES = [
    ({"model__num_layers": 2}, "config.model.num_layers is 2, and 3 in the donor"),
    ({"model__use_bias": True}, "config.model.use_bias is True, and False in the donor"),
    ({"model__block_size": 512}, "config.model.block_size is 512, and the donor .* has 128 positions"),
    ({"model__num_heads": 8}, "config.model.num_heads is 8, and 4 in .*: give --config.model.num_heads=4"),
    ({"init_from": ""}, "config.model.block_size has no value: .* give --config.init_from=RUN or hf:NAME"),
    ({"init_from": "nowhere"}, "config.init_from=nowhere: there is no run nowhere: .*; hf:NAME is a model of Hugging"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[next(iter(changes)) for changes, _ in MISTAKES])
def test_a_value_that_the_donor_cannot_have_is_an_error(donor, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        fill_in(finetuning(donor, **changes), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("init_from", 5, "config.init_from must be text, found 5"),
        ("model.block_size", "x", "config.model.block_size must be a whole number from 1"),
        ("num_steps", None, "config.num_steps must be a whole number from 1"),
    ],
)
def test_a_value_of_another_kind_is_said_before_the_donor_is_looked_for(donor, name, value, message):
    config = finetuning(donor)
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message):
        fill_in(config, None)


def test_a_donor_of_other_heads_is_refused_by_a_config_with_a_model_of_its_own(donor):
    config = chat_tiny.get_config()
    config.init_from, config.model.num_heads = str(donor), 8  # every parameter would fit
    with pytest.raises(UserError, match=r"num_heads is 8, and 4 in .*, whose parameters mean other heads then"):
        fill_in(config, None)
    config.model.update(num_heads=4, num_layers=7, soft_cap=30.0)  # takes what fits
    assert fill_in(config, None).model.num_layers == 7


def test_a_donor_without_a_config_needs_all_of_the_model(donor):
    (donor / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config.json says what model it is: give config.model.\w+ and all others"):
        fill_in(finetuning(donor), None)


def test_a_run_that_goes_on_has_its_own_model_and_donor(donor, tmp_path):
    run = write_run(tmp_path / "run", init_from=str(donor), model__num_layers=3, data__targets="assistant")
    filled = fill_in(finetuning("elsewhere"), run)
    assert (filled.init_from, filled.model.num_layers) == (str(donor), 3)


FIXED = {
    "model__num_heads": 2,
    "model__soft_cap": 0.0,
    "model__block_size": 64,
    "optimizer__frozen": ("wte",),
    "data__targets": "assistant",
    "data__weights": (1, 2),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_a_checkpoint_is_made_for_does_not_change(tmp_path, name):
    run, config = write_run(tmp_path / "run"), chat_tiny.get_config()
    fill_in(config, run)
    config.update_from_flattened_dict({name.replace("__", "."): FIXED[name], "model.dropout_rate": 0.5})
    with pytest.raises(UserError, match=rf"does not fit this config: {name.replace('__', '.')} was .*, now ") as caught:
        fill_in(config, run)
    assert "\n" not in str(caught.value)


def test_losses_on_data_of_their_own_do_not_depend_on_the_weights(tmp_path):
    run = write_run(tmp_path / "run", data__validation="more.jsonl")
    config = chat_tiny.get_config()
    config.data.update(validation="more.jsonl", weights=(1, 2))
    assert fill_in(config, run).data.weights == (1, 2)


@pytest.mark.parametrize(("saved", "now"), [((1, 3), (2, 6)), ((), (2, 2)), ((1, 1, 1), ())])
def test_weights_that_mean_the_same_are_the_same(saved, now, tmp_path):
    run, config = write_run(tmp_path / "run", data__weights=saved), chat_tiny.get_config()
    config.data.weights = now
    assert fill_in(config, run).data.weights == now


def test_a_donor_that_is_not_read_is_told(donor, tmp_path, capsys):
    run = write_run(tmp_path / "run", init_from=str(donor))
    filled = fill_in(finetuning("another", data__targets="all"), run)
    assert filled.init_from == str(donor)
    [told] = capsys.readouterr().err.splitlines()
    assert (
        told
        == f"warning: config.init_from=another is not read: the run in {run} goes on from its own checkpoint, and "
        + (f"began with {donor}")
    )
    fill_in(filled, run)
    fill_in(chat_tiny.get_config(), run)
    assert capsys.readouterr().err == ""


# ---- the short command


def short_command(run, *changes):
    """(config, what the command line changes in it) of a command line without --config."""
    values, argv = flags.FlagValues(), ["main", f"--workdir={run}", *changes]
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    define_config_flag(values, argv, config_of_run)
    parse_flags(argv, values)
    flag = values["config"]
    assert flag.using_default_value
    return flag.value, flag.override_values


def test_a_run_goes_on_by_its_own_config_and_what_is_changed_in_it(tmp_path):
    run = write_run(tmp_path / "run", sample__prompts=("moon?",), optimizer__rates=("wte=0.5",))
    config, _ = short_command(run)
    validate(config)
    assert (config.num_steps, config.sample.prompts, config.optimizer.rates) == (1200, ("moon?",), ("wte=0.5",))
    config, given = short_command(run, "--config.optimizer.weight_decay=0", "--config.sample.prompts=('sun?',)")
    assert (config.optimizer.weight_decay, config.sample.prompts) == (0.0, ("sun?",))
    assert set(given) == {"optimizer.weight_decay", "sample.prompts"}


def test_a_setting_that_is_added_has_a_default():
    """Else a run that was saved before could not go on. These are the settings of the first version."""
    first = {
        "": "name domain seed backend matmul_precision num_steps batch_size accumulate_steps max_skipped_steps "
        "init_from",
        "model.": "vocab_size block_size num_layers num_heads embed_dim dropout_rate soft_cap use_bias tie_head dtype "
        "remat",
        "optimizer.": "learning_rate min_learning_rate warmup_steps decay_steps b1 b2 epsilon weight_decay "
        "decay_matrices_only clip_norm",
        "data.": "source validation_fraction tokenizer targets cache_dir prefetch",
        "eval.": "every batches",
        "sample.": "every temperature top_k max_tokens prompts",
        "checkpoint.": "every keep_last keep_every",
        "log.": "every diagnostics_every tensorboard profile_step profile_steps",
    }
    expected = {group + name for group, names in first.items() for name in names.split()}
    assert {name for name, field in FIELDS.items() if field.default is None} == expected


def test_the_config_of_a_run_of_an_older_version_is_filled_up(tmp_path):
    run = write_run(tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    added = [name for name, field in FIELDS.items() if field.default is not None]
    for name in added:
        group, _, last = name.rpartition(".")
        del (saved[group] if group else saved)[last]
    write_json(run / "config.json", saved)
    config, _ = short_command(run)
    validate(config)
    assert all(with_defaults(config)[name] == FIELDS[name].default for name in added)
    validate(fill_in(config, run))


BAD_SHORT = [
    ("{run}@100", "a run goes on from its newest checkpoint: give --workdir={run}, or begin another with"),
    ("{tmp}", "{tmp} has no config.json, so it is no run to go on with"),
    ("{tmp}/none", "there is no run {tmp}/none: "),
    ("{run} --config.model.num_hedas=2", "did you mean config.model.num_heads?"),
    ("{run} --config.num_steps=x", "must be a whole number"),
    ("{newer}", "config.json: this program knows no model.colour: a newer one wrote it"),
    ("{lacking}", "config.json lacks num_steps: put back a good copy"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_SHORT, ids=[arguments for arguments, _ in BAD_SHORT])
def test_a_mistake_in_the_short_command_costs_one_line(tmp_path, arguments, message):
    names = {name: write_run(tmp_path / name) for name in ("run", "newer", "lacking")} | {"tmp": tmp_path}
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    write_json(tmp_path / "newer" / "config.json", saved | {"model": saved["model"] | {"colour": 1}})
    write_json(tmp_path / "lacking" / "config.json", {name: saved[name] for name in saved if name != "num_steps"})
    with pytest.raises((UserError, flags.Error)) as caught:
        short_command(*arguments.format(**names).split(" "))
    inner = caught.value.__context__
    said = str(inner if isinstance(inner, UserError) else caught.value)
    assert message.format(**names) in said
    assert "\n" not in said


def test_without_a_run_there_is_no_config():
    assert config_of_run(["--config.seed=1", "x"]) is None
    assert config_of_run(["--workdir="]) is None


@pytest.mark.parametrize(
    ("decay_steps", "changes", "expected"),
    [
        (1200, ["--config.num_steps=2400"], 2400),
        (1200, [], 1200),
        (1200, ["--config.num_steps=2400", "--config.optimizer.decay_steps=1200"], 1200),
        (5000, ["--config.num_steps=2400"], 5000),
        (0, ["--config.num_steps=2400"], 0),
    ],
)
def test_a_schedule_that_ended_with_the_run_still_does(tmp_path, decay_steps, changes, expected):
    run = write_run(tmp_path / "run", optimizer__decay_steps=decay_steps)
    config, given = short_command(run, *changes)
    follow_num_steps(config, run, given)
    assert config.optimizer.decay_steps == expected


def test_a_config_of_a_run_is_a_config_for_another(tmp_path):
    run = write_run(tmp_path / "run", batch_size=3)
    assert load_config(str(run / "config.json")).batch_size == 3


# ---- complete runs


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([3.0, 2.0, 2.5, 2.1], 2, "2 evaluations brought no lower validation loss (the lowest is 2.0000, of step 1)"),
        ([3.0, 2.0, 2.5, 2.1], 3, None),
        ([3.0, 2.0, 2.5, 2.1], 0, None),
        ([3.0, 3.0], 1, "1 evaluation brought no lower validation loss (the lowest is 3.0000, of step 0)"),
        ([float("nan"), float("inf")], 2, "2 evaluations brought no lower validation loss (none was finite)"),
        ([float("nan"), 4.0], 1, None),
        ([], 1, None),
    ],
)
def test_patience_counts_evaluations_since_the_lowest_loss(losses, patience, expected):
    assert why_stop([Evaluation(step, loss) for step, loss in enumerate(losses)], patience) == expected


def test_a_run_that_goes_on_reads_no_donor_so_that_it_is_checked_before_jax(tmp_path):
    run, config = write_run(tmp_path / "run", init_from="hf:gone", num_steps=100), chat_tiny.get_config()
    config.init_from = "hf:gone"
    assert not reads_hugging_face(config, run)
    config.model.num_layers = None
    assert fill_in(config, run).model.num_layers == 2
    assert reads_hugging_face(config, tmp_path / "another")
    assert reads_hugging_face(config, None)
    config.init_from = "latest"
    assert not reads_hugging_face(config, None)


def test_a_complete_run_says_how_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_jax.training.history.read_losses", lambda directory: {100: 2.0, 60: 1.0})
    run = write_run(tmp_path / "run", status="completed", validation=[(60, 1.0), (100, 2.0)], num_steps=100)
    config = chat_tiny.get_config()
    config.num_steps, config.eval.patience = 100, 1
    assert why_complete(config, run).endswith("is complete, at step 100: a larger --config.num_steps=N goes on with it")
    config.num_steps = 200
    assert why_complete(config, run) is None
    write_json(run / "run.json", {"status": "completed", "last_checkpoint": 100, "stopped_early": "so"})
    told = why_complete(config, run)
    assert "stopped early, at step 100: 1 evaluation brought no lower" in told
    assert told.endswith("a larger --config.eval.patience=N, or 0, goes on with it, to step 200")
    config.eval.patience = 2
    assert why_complete(config, run) is None
    write_json(run / "run.json", {"status": "interrupted", "last_checkpoint": 100})
    config.num_steps = 100
    assert why_complete(config, run) is None


@pytest.mark.parametrize("setting", ["data.source={}", "data.mixture=('{}',)", "data.validation={}"])
def test_data_that_is_not_there_is_told_before_jax_is_imported(setting, tmp_path, monkeypatch):
    """And before a model is traced, in this process and in those that it would start."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(main, "require_jax", lambda: pytest.fail("jax is imported"))
    words = ["main", "--config=configs/chat_tiny.py", f"--config.{setting.format(tmp_path / 'chats.jsonl')}"]
    main.define_flags(values, words)
    parse_flags(words, values)
    with pytest.raises(UserError, match=r"chats\.jsonl' does not exist"):
        main.main(["main"])
    values.config.distributed = "127.0.0.1:1,2,1"  # of several processes, the others are to hear of it
    with pytest.raises(pytest.fail.Exception, match="jax is imported"):
        main.main(["main"])
