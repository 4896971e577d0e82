"""Every config is valid, and every mistake in one costs a single line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from configs import chat, chat_gpt2, chat_tiny, gpt2_124m
from gpt_jax.cli import parse_flags
from gpt_jax.config import FIELDS, validate
from gpt_jax.config_file import define_config_flag, describe_changes, load_config
from gpt_jax.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", [chat, chat_gpt2, chat_tiny, gpt2_124m])
def test_configs_are_valid_and_open_with_their_command(module):
    validate(module.get_config())
    name = module.__name__.split(".")[-1]
    assert f"python -m gpt_jax.main --config=configs/{name}.py" in module.__doc__


def test_chat_is_the_reference_run():
    config = chat.get_config()
    assert config.model.to_dict() == {
        "vocab_size": 4000,
        "block_size": 256,
        "num_layers": 6,
        "num_heads": 8,
        "embed_dim": 256,
        "mlp_dim": 0,
        "norm_epsilon": 1e-5,
        "dropout_rate": 0.1,
        "soft_cap": 30.0,
        "use_bias": False,
        "tie_head": False,
        "dtype": "float32",
        "remat": False,
    }
    assert config.optimizer.to_dict() == {
        "learning_rate": 3e-5,
        "min_learning_rate": 3e-6,
        "warmup_steps": 500,
        "decay_steps": 0,
        "b1": 0.9,
        "b2": 0.99,
        "epsilon": 1e-8,
        "weight_decay": 0.1,
        "decay_matrices_only": True,
        "clip_norm": 1.0,
        "frozen": (),
        "layer_decay": 1.0,
        "rates": (),
    }
    assert (config.seed, config.batch_size, config.accumulate_steps, config.num_steps) == (42, 16, 1, 50_000)
    assert (config.eval.every, config.eval.batches) == (2500, 10)
    sample = config.sample
    assert (sample.every, sample.temperature, sample.top_k, sample.max_tokens) == (500, 0.8, 40, 80)


def leaf_names(config: ConfigDict, prefix: str = "") -> set[str]:
    names = set()
    for name, value in config.items():
        inner = leaf_names(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name}
        names |= inner
    return names


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.stem)
def test_every_setting_of_every_config_is_in_the_table(file):
    if file.stem == "__init__":
        return
    config = load_config(str(file))
    assert leaf_names(config) == FIELDS.keys()
    assert all(field.meaning and "\n" not in field.meaning for field in FIELDS.values())


INT32, NUMBER = 2**31 - 1, "must be a number in "
BAD_VALUES = [
    ({"backend": "cuda"}, "config.backend must be one of auto, xla, vulkan; found 'cuda'"),
    ({"num_steps": 0}, f"config.num_steps must be a whole number from 1 to {INT32}, found 0"),
    ({"num_steps": 2**40}, f"config.num_steps must be a whole number from 1 to {INT32}, found {2**40}"),
    ({"num_steps": True}, f"config.num_steps must be a whole number from 1 to {INT32}, found True"),
    ({"optimizer.decay_steps": 2**31}, f"config.optimizer.decay_steps must be a whole number from 0 to {INT32}, found"),
    ({"seed": 2**32}, f"config.seed must be a whole number from 0 to {2**32 - 1}, found {2**32}"),
    ({"seed": -1}, f"config.seed must be a whole number from 0 to {2**32 - 1}, found -1"),
    ({"seed": 2**70}, f"config.seed must be a whole number from 0 to {2**32 - 1}, found {2**70}"),
    ({"model.num_heads": 7}, "config.model.embed_dim must be a multiple of num_heads, found 256 and 7"),
    ({"model.dropout_rate": 1.0}, f"config.model.dropout_rate {NUMBER}[0, 1), found 1.0"),
    ({"model.dropout_rate": -1e-3}, f"config.model.dropout_rate {NUMBER}[0, 1), found -0.001"),
    ({"model.dropout_rate": 0.99999999}, f"config.model.dropout_rate {NUMBER}[0, 1), found 0.99999999, which is 1 in"),
    ({"model.dtype": "float16"}, "config.model.dtype must be one of float32, bfloat16; found 'float16'"),
    ({"model.soft_cap": float("nan")}, f"config.model.soft_cap {NUMBER}[0, inf), found nan"),
    ({"model.soft_cap": 1e-40}, f"config.model.soft_cap {NUMBER}[0, inf), found 1e-40, which is 0 in float32"),
    ({"accumulate_steps": 3}, "config.batch_size must be a multiple of accumulate_steps, found 16 and 3"),
    ({"optimizer.learning_rate": -1.0}, f"config.optimizer.learning_rate {NUMBER}(0, inf), found -1.0"),
    ({"optimizer.learning_rate": -0.0}, f"config.optimizer.learning_rate {NUMBER}(0, inf), found -0.0"),
    ({"optimizer.learning_rate": 1e39}, f"config.optimizer.learning_rate {NUMBER}(0, inf), found 1e+39, which is inf"),
    (
        {"optimizer.min_learning_rate": 1.0},
        "config.optimizer.min_learning_rate must not exceed learning_rate, found 1.0 and 3e-05",
    ),
    ({"optimizer.b2": 1.0}, f"config.optimizer.b2 {NUMBER}[0, 1), found 1.0"),
    ({"optimizer.epsilon": float("inf")}, f"config.optimizer.epsilon {NUMBER}(0, inf), found inf"),
    ({"optimizer.epsilon": 1e-50}, f"config.optimizer.epsilon {NUMBER}(0, inf), found 1e-50, which is 0 in float32"),
    ({"optimizer.clip_norm": 0.0}, f"config.optimizer.clip_norm {NUMBER}(0, inf), found 0.0"),
    (
        {"optimizer.warmup_steps": 50_000, "optimizer.decay_steps": 50_000},
        "config.optimizer.warmup_steps must be below decay_steps, where the schedule ends, found 50000 and 50000",
    ),
    (
        {"lora.rank": 300, "init_from": "runs/donor"},
        "config.lora.rank must not exceed model.embed_dim, the smaller side of the matrices that it adapts, found 300 "
        "and 256",
    ),
    ({"lora.rank": 8}, "config.lora.rank is 8, and config.init_from is empty: adapters stand beside a model that was"),
    ({"lora.dropout": 1.0}, f"config.lora.dropout {NUMBER}[0, 1), found 1.0"),
    ({"data.validation_fraction": 0.0}, f"config.data.validation_fraction {NUMBER}(0, 1), found 0.0"),
    ({"data.mixture": ("a", "")}, "config.data.mixture[1] must be text of 1 or more characters, found ''"),
    (
        {"data.mixture": ("a", "b"), "data.weights": (1.0, 0.0)},
        f"config.data.weights[1] {NUMBER}(0, inf), found 0.0",
    ),
    ({"data.mixture": ("a",), "data.weights": ("1",)}, f"config.data.weights[0] {NUMBER}(0, inf), found '1'"),
    (
        {"data.mixture": ("a", "b"), "data.weights": (1,)},
        "config.data.weights must be as many as data.mixture has sources, or none, found ('a', 'b') and (1,)",
    ),
    (
        {"data.source": "c", "data.mixture": ("a", "b")},
        "config.data.source must stay 'default' where data.mixture is given: put it into the mixture, found c and "
        "('a', 'b')",
    ),
    ({"data.targets": "user"}, "config.data.targets must be one of all, assistant; found 'user'"),
    ({"data.source": "a\0b"}, r"config.data.source must be text in UTF-8, found '\x00' in it"),
    ({"name": "\udcff"}, r"config.name must be text in UTF-8, found '\udcff' in it"),
    ({"sample.temperature": -0.5}, f"config.sample.temperature {NUMBER}[0, inf), found -0.5"),
    ({"sample.temperature": float("nan")}, f"config.sample.temperature {NUMBER}[0, inf), found nan"),
    ({"sample.top_k": -1}, f"config.sample.top_k must be a whole number from 0 to {INT32}, found -1"),
    ({"sample.prompts": (5,)}, "config.sample.prompts[0] must be text, found 5"),
    ({"sample.prompts": ("a", "\ud800")}, r"config.sample.prompts[1] must be text in UTF-8, found '\ud800' in it"),
    ({"sample.top_p": 0.0}, f"config.sample.top_p {NUMBER}(0, 1], found 0.0"),
    ({"sample.min_p": 1.5}, f"config.sample.min_p {NUMBER}[0, 1], found 1.5"),
    ({"sample.repetition_penalty": 0.0}, f"config.sample.repetition_penalty {NUMBER}(0, inf), found 0.0"),
    ({"sample.presence_penalty": 3.0}, f"config.sample.presence_penalty {NUMBER}[-2, 2], found 3.0"),
    ({"sample.frequency_penalty": -3.0}, f"config.sample.frequency_penalty {NUMBER}[-2, 2], found -3.0"),
    ({"sample.stop": ("a", "")}, "config.sample.stop[1] must be text of 1 or more characters, found ''"),
    ({"eval.every": -1}, f"config.eval.every must be a whole number from 0 to {INT32}, found -1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES)
def test_bad_values_are_refused_in_one_line(changes, message):
    config: ConfigDict = chat.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as caught:
        validate(config)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_values_at_the_ends_of_their_ranges_are_taken():
    config = chat.get_config()
    ends = {"seed": 2**32 - 1, "num_steps": INT32, "sample.temperature": 0, "sample.prompts": (), "model.soft_cap": 30}
    ends |= {f"{group}.every": 0 for group in ("eval", "sample", "checkpoint", "log")}
    ends |= {"optimizer.learning_rate": 1e38, "optimizer.epsilon": 1.2e-38, "log.diagnostics_every": 0}
    config.update_from_flattened_dict(ends)
    validate(config)


TABLE_TYPES = [
    ("num_steps", 10.0, "must be a whole number from 1 to"),
    ("num_steps", None, "must be a whole number from 1 to"),
    ("model.dropout_rate", "0.1", "must be a number in [0, 1), found '0.1'"),
    ("model.dropout_rate", True, "must be a number in [0, 1), found True"),
    ("optimizer.learning_rate", 10**400, "must be a number in (0, inf), found 1000000"),
    ("model.use_bias", 1, "must be True or False, found 1"),
    ("data.source", None, "must be text, found None"),
    ("data.source", b"x", "must be text, found b'x'"),
    ("sample.prompts", "Hi", "must be a list of texts, found 'Hi'"),
    ("sample.prompts", None, "must be a list of texts, found None"),
    ("model", 5, "must be a group of settings, found 5"),
    ("seed", 10**5000, "must be a whole number from 0 to"),
    ("name", "x" * 500 + "\0", "must be text in UTF-8, found"),
]


@pytest.mark.parametrize(("name", "value", "message"), TABLE_TYPES, ids=range(len(TABLE_TYPES)))
def test_a_value_of_another_kind_is_refused_in_one_line(name, value, message):
    config = chat.get_config().to_dict()  # a ConfigDict would refuse some of them itself
    *group, last = name.split(".")
    (config[group[0]] if group else config)[last] = value
    with pytest.raises(UserError) as caught:
        validate(config)
    assert f"config.{name} {message}" in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


CONFIG_FILES = [
    ("def get_config(:\n", "file.py, line 1: SyntaxError: invalid syntax"),
    ("\ndef get_config():\n    return foo\n", "file.py, line 3: NameError: name 'foo' is not defined"),
    ("import nothing_such\n", "file.py, line 1: ModuleNotFoundError: No module named 'nothing_such'"),
    ("1 / 0\n", "file.py, line 1: ZeroDivisionError: division by zero"),
    ("import sys\nsys.exit(3)\n", "file.py, line 2: SystemExit: 3"),
    ("x = 1\n", "file.py has no function get_config()"),
    ("get_config = 1\n", "file.py has no function get_config()"),
    ("def get_config():\n    return {}\n", "file.py must return a ConfigDict, found dict"),
    ("def get_config():\n    pass\n", "file.py must return a ConfigDict, found NoneType"),
    ("def get_config(x):\n    return x\n", "file.py: TypeError: get_config() missing 1 required positional argument"),
    ("def get_config():\n    raise ValueError('a\\nb')\n", "file.py, line 2: ValueError: a b"),
    ("def get_config():\n    open('/none/such')\n", "file.py, line 2: FileNotFoundError: "),
    ("def get_config():\n    return get_config()\n", "file.py, line 2: RecursionError: "),
    ("from ml_collections import ConfigDict as get_config\n", "the config lacks config.name, config.domain, "),
    (
        "{chat}    config.optimizer.learning_rat = 1.0\n    return config\n",
        "there is no config.optimizer.learning_rat: did",
    ),
    ("{chat}    config.model = 5\n    return config\n", "file.py, line 5: TypeError: Could not override field 'model'"),
    ("{chat}    del config.seed\n    return config\n", "file.py: the config lacks config.seed: "),
    ("\0", "file.py: SyntaxError: source code string cannot contain null bytes"),
    ("é", "file.py, line 1: SyntaxError: "),
]


@pytest.mark.parametrize(("source", "message"), CONFIG_FILES, ids=range(len(CONFIG_FILES)))
def test_a_mistake_in_a_config_file_is_named_with_its_line(source, message, tmp_path):
    chat_of = "from configs import chat\n\n\ndef get_config():\n    config = chat.get_config()\n"
    chat_of = chat_of.replace("\n\n\n", "\n\n")
    (tmp_path / "file.py").write_bytes(source.replace("{chat}", chat_of).encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "file.py"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_folder_is_named_with_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_config("configs/chat.py")
    assert str(caught.value) == f"--config=configs/chat.py does not exist in {tmp_path}: give its path from there"


CHAT = f"--config={ROOT / 'configs' / 'chat.py'}"
FLAGS = [
    ([f"--config={ROOT / 'configs' / 'nope.py'}"], "does not exist; there are"),
    ([f"--config={ROOT / 'configs' / 'chat_tin.py'}"], "chat_tiny.py?"),
    ([f"--config={ROOT / 'README.md'}"], "is no Python file"),
    ([f"--config={ROOT / 'configs'}"], "is a folder: give a file of it"),
    (["--config="], "--config is empty"),
    (["--config"], "Missing value for flag --config"),
    ([CHAT + ":x"], "get_config() takes 0 positional arguments but 1 was given"),
    ([CHAT, CHAT, "--config.seed=1"], "--config is given twice"),
    ([CHAT, "--config.optimizer.learning_rat=1"], "did you mean config.optimizer.learning_rate?"),
    ([CHAT, "--config.optimzer.learning_rate=1"], "did you mean config.optimizer.learning_rate?"),
    ([CHAT, "--config.learning_rate=1"], "did you mean config.optimizer.learning_rate?"),
    ([CHAT, "--config.model.num_heds=4"], "did you mean config.model.num_heads?"),
    ([CHAT, "--config.modle=4"], "did you mean config.model?"),
    ([CHAT, "--noconfig.use_bias"], "did you mean config.model.use_bias?"),
    ([CHAT, "--config.model=5"], "config.model is a group of settings: give one of it (model.vocab_size, "),
    ([CHAT, "--config.foo.bar=1"], "there is no config.foo.bar: there are model, optimizer"),
    ([CHAT, "--config.=1"], "there is no config.: there are"),
    ([CHAT, "--config.model[0]=1"], "there is no config.model[0]"),
    ([CHAT, "--config.batch_size"], "Missing value for flag --config.batch_size"),
    ([CHAT, "--config.batch_size=4.5"], "flag --config.batch_size=4.5: must be a whole number"),
    ([CHAT, "--config.batch_size=None"], "must be a whole number"),
    ([CHAT, "--config.batch_size="], "must be a whole number"),
    ([CHAT, "--config.optimizer.b1=abc"], "must be a number"),
    ([CHAT, "--config.model.use_bias=maybe"], "must be true or false"),
    ([CHAT, "--config.sample.prompts=5"], "config.sample.prompts[0] must be text, found 5"),
    ([CHAT, "--config.sample.prompts=[1,2]"], "config.sample.prompts[0] must be text, found 1"),
    ([CHAT, "--config.sample.prompts=[1, 2"], "Error while parsing"),
    (["--config.batch_size=4"], "--config.batch_size changes a config: give --config=FILE before it"),
    (["--num_steps=4"], "Unknown command line flag 'num_steps'"),
    ([CHAT, "--seed=4"], "there is no flag --seed; a config's value is --config.seed"),
    (["--config.batch_size=4", CHAT], "before a value for --config"),
    ([CHAT, "--confg.seed=1"], "Unknown command line flag"),
]


@pytest.mark.parametrize(("arguments", "message"), FLAGS, ids=[" ".join(arguments[-1:]) for arguments, _ in FLAGS])
def test_a_mistake_in_a_flag_costs_one_line(arguments, message):
    values, argv = flags.FlagValues(), ["main", *arguments]

    def load() -> None:
        holder = define_config_flag(values, argv)
        parse_flags(argv, values)
        validate(holder.value)

    with pytest.raises(UserError) as caught:
        load()
    assert message in str(caught.value)


def test_what_the_command_line_changed_is_told_from_the_file():
    values, argv = flags.FlagValues(), ["main", CHAT, "--config.batch_size=16", "--config.model.dtype=bfloat16"]
    assert describe_changes(ConfigDict(), values) is None
    holder = define_config_flag(values, argv)
    parse_flags(argv, values)
    found = describe_changes(holder.value, values)
    assert found == {"path": CHAT.partition("=")[2], "values": {"model.dtype": "float32"}}


MISTAKES = [
    (["--config=configs/chat.py", "--config.model.num_heds=4"], "did you mean config.model.num_heads?"),
    (["--config=configs/chat.py", "--wrkdir=x"], "Did you mean: workdir"),
    (["--config=configs/chat.py", "--config.model.num_heads=7"], "embed_dim must be a multiple of num_heads"),
    (["--config=configs/chat.py", "--flagfile=none"], "Unable to open flagfile"),
    (["--config=configs/chat.py", "extra"], "unexpected argument 'extra'"),
]
# The commands are forks of one process that has imported most of what they do: a start of its own is half a second.
FORKS = """
import json, os, runpy, sys
import gpt_jax.distributed.launch, gpt_jax.training.open_settings
commands, folder = json.loads(sys.argv[1]), sys.argv[2]
for place, arguments in enumerate(commands):
    if not os.fork():
        os.dup2(os.open(f"{folder}/{place}.err", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = sys.orig_argv = ["main", *arguments, f"--workdir={folder}/run"]
        runpy.run_module("gpt_jax.main", run_name="__main__", alter_sys=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> list[tuple[int, str]]:
    """The exit code of each command with a mistake, and what it printed on standard error."""
    folder = tmp_path_factory.mktemp("commands")
    commands = json.dumps([arguments for arguments, _ in MISTAKES])
    command = [sys.executable, "-c", FORKS, commands, str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert not (folder / "run").exists()
    return [(int(code), (folder / f"{place}.err").read_text()) for place, code in enumerate(done.stdout.split())]


def check_mistake(code: int, printed: str, expected: str) -> None:
    assert code == 2
    [line] = printed.splitlines()
    assert line.startswith("error: ")
    assert expected in line


@pytest.mark.parametrize("place", range(len(MISTAKES)), ids=[arguments[-1] for arguments, _ in MISTAKES])
def test_command_line_mistakes_say_how_to_mend_them(place, ended):
    assert len(ended) == len(MISTAKES)
    check_mistake(*ended[place], MISTAKES[place][1])


def test_a_command_line_without_a_config_says_what_to_give():
    command = [sys.executable, "-m", "gpt_jax.main"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    check_mistake(done.returncode, done.stderr, "give --config=configs/chat.py")
