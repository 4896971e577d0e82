"""Reads what `--config=` names, a Python file or the `config.json` of a run that goes on, and `--config.x=y` after it.

A mistake in a file costs one line with file, line number and what is wrong.
"""

import difflib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from gpt_jax.config import FIELDS, check_name, check_names, leaves, with_defaults
from gpt_jax.errors import UserError
from gpt_jax.runs.info import CONFIG_FILE, read_config
from gpt_jax.runs.webhook import SETTING as WEBHOOK
from gpt_jax.runs.webhook import public_url

_CONFIGS = Path("configs")  # in the current folder, where a name that is not found is looked for
_SHIPPED = Path(__file__).parent / "configs"  # in a wheel; a checkout has them at its top
_LONGEST = 300  # characters of another library's message


class ValueParser(flags.ArgumentParser):
    """Another parser, which says in plain words what it wanted."""

    def __init__(self, parser: flags.ArgumentParser, wanted: str) -> None:
        self._parser, self._wanted = parser, wanted

    def parse(self, argument: object) -> object:
        try:
            return self._parser.parse(argument)
        except (TypeError, ValueError):
            raise ValueError(f"must be {self._wanted}") from None

    def flag_type(self) -> str:
        return self._parser.flag_type()


WHOLE = ValueParser(flags.IntegerParser(), "a whole number")
NUMBER = ValueParser(flags.FloatParser(), "a number")
FLAG = ValueParser(flags.BooleanParser(), "true or false")


def define_config_flag(
    flag_values: flags.FlagValues = flags.FLAGS,
    arguments: Sequence[str] | None = None,
    default: Callable[[Sequence[str]], Path | None] = lambda _: None,
) -> flags.FlagHolder[ConfigDict]:
    """Defines `--config=FILE`, and `--config.x.y=VALUE` for each of its settings.

    Args:
      flag_values: where it is defined.
      arguments: the command line, the program's name first; None: that of this process.
      default: gives the file for a command line without `--config`, by its arguments; None: there is none.
    """
    for kind, parser in ((int, WHOLE), (float, NUMBER), (bool, FLAG)):
        config_flags.register_flag_parser_for_type(kind, parser)
    argv = sys.argv if arguments is None else list(arguments)
    text = "A file of configs/. --config.NAME=VALUE changes a setting of it; gpt_jax/config.py says what each may be."
    holder = config_flags.DEFINE_config_file("config", help_string=text, flag_values=flag_values, sys_argv=argv)

    def read_arguments() -> list[str]:
        return flag_values.read_flags_from_files(argv[1:], force_gnu=False)

    flag_values["config"].parser = _ConfigParser(read_arguments)
    if not any(map(_GIVES_CONFIG, given := read_arguments())) and (file := default(given)) is not None:
        flag_values.set_default("config", str(file))
    return holder


_GIVES_CONFIG = re.compile(r"--?config(=|$)").match


class _ConfigParser(flags.ArgumentParser):
    """Loads the config and checks the names of all settings that the command line changes in it."""

    def __init__(self, read_arguments: Callable[[], list[str]]) -> None:
        self._read_arguments = read_arguments
        self.file: tuple[str, dict[str, Any]] | None = None  # as given, and its values, once it is read

    def parse(self, argument: str) -> ConfigDict:
        arguments = self._read_arguments()
        if sum(_GIVES_CONFIG(text) is not None for text in arguments) > 1:
            raise UserError("--config is given twice: give one, and change its settings by --config.NAME=VALUE")
        config = load_config(argument)
        self.file = argument, dict(leaves(config))
        for text in arguments:
            if changed := re.match(r"--?(?:no)?config\.([^=]*)", text):
                check_name(changed[1])
        return config.lock()

    def flag_type(self) -> str:
        return "config file"


def describe_changes(config: ConfigDict, flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, Any] | None:
    """The file that `--config` named, and its values of the settings that the command line changed since.

    Returns:
      path, and values by dotted name; None if no flag gave the config.
    """
    file = getattr(flag_values["config"].parser, "file", None) if "config" in flag_values else None
    if file is None:
        return None
    path, before = file
    values = {name: before[name] for name, now in leaves(config) if before[name] != now}
    if WEBHOOK in values:
        values[WEBHOOK] = public_url(values[WEBHOOK])
    return {"path": path, "values": values}


def load_config(path: str) -> ConfigDict:
    """Calls `get_config()` of a Python file; of FILE:TEXT, `get_config(TEXT)`. Or reads the `config.json` of a run.

    A `configs/NAME.py` that the current folder lacks is the one that was installed with `gpt_jax`.

    Raises:
      UserError: there is no such file, it cannot be run, or it gives no config with all settings.
    """
    if Path(path).name == CONFIG_FILE and os.path.isfile(path):
        return load_saved_config(Path(path))
    name, *argument = path.split(":", 1)
    file = _find(name)
    _require_python_file(name, file)
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    try:
        _make_shipped_configs_importable()
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"{file} has no function get_config(): see configs/chat.py")
        config = get_config(*argument)
        if not isinstance(config, ConfigDict):
            raise UserError(f"get_config() of {file} must return a ConfigDict, found {type(config).__name__}")
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(_describe(error, file)) from error
    try:
        check_names(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def load_saved_config(file: Path) -> ConfigDict:
    """The config that a run saved; settings that its version did not have yet are as they were before there were any.

    Raises:
      UserError: the file is damaged, lacks a setting, or has one that only a newer program knows.
    """
    saved = read_config(file.parent)
    if newer := [name for name, _ in leaves(saved) if name not in FIELDS]:
        raise UserError(f"{file}: this program knows no {newer[0]}: a newer one wrote it, use that one")
    values = with_defaults(saved)
    if missing := [name for name, value in values.items() if value is None]:
        raise UserError(f"{file} lacks {', '.join(missing[:5])}: put back a good copy")
    config = ConfigDict()
    for name, value in values.items():
        group, _, last = name.rpartition(".")
        if group and group not in config:
            config[group] = ConfigDict()
        (config[group] if group else config)[last] = value
    return config


def _find(name: str) -> Path:
    file = Path(name)
    if not file.exists() and file.parts[:1] == _CONFIGS.parts:
        shipped = _SHIPPED.joinpath(*file.parts[1:])
        return shipped if shipped.exists() else file
    return file


def _make_shipped_configs_importable() -> None:
    """Lets `from configs import chat` find the current folder's file first, and then the one installed here.

    A module `configs` that is no package stays what it is.
    """
    if not _SHIPPED.is_dir():
        return
    try:
        configs = importlib.import_module("configs")
    except ModuleNotFoundError as error:
        if error.name != "configs":
            raise
        sys.modules["configs"] = importlib.import_module("gpt_jax.configs")
        return
    path = getattr(configs, "__path__", None)
    if path is not None and str(_SHIPPED) not in path:
        path.append(str(_SHIPPED))


def _require_python_file(name: str, file: Path) -> None:
    if not name:
        raise UserError("--config is empty: give --config=configs/chat.py, or another file of configs/")
    if file.is_dir():
        raise UserError(f"--config={name} is a folder: give a file of it{_there_are(file)}")
    if not file.exists():
        folder = file.parent if file.parent.is_dir() and any(file.parent.glob("*.py")) else _CONFIGS
        near = difflib.get_close_matches(file.name, [other.name for other in _python_files(folder)], n=1)
        hint = f": did you mean {folder / near[0]}?" if near else _there_are(folder)
        here = "" if file.is_absolute() or not _SHIPPED.is_dir() else " here, nor in the configs installed with gpt_jax"
        if not hint and not here and not file.is_absolute():
            here = f" in {Path.cwd()}: give its path from there"
        raise UserError(f"--config={name} does not exist{here}{hint}")
    if not file.is_file() or file.suffix != ".py":
        raise UserError(
            f"--config={name} is no Python file: give one with a function get_config(){_there_are(_CONFIGS)}"
        )


def _there_are(folder: Path) -> str:
    found = [str(file) for file in _python_files(folder)][:8]
    return f"; there are {', '.join(found)}" if found else ""


def _python_files(folder: Path) -> list[Path]:
    """The configs of a folder; to those of `configs/` belong the installed ones."""
    folders = [folder, _SHIPPED] if folder == _CONFIGS else [folder]
    names = {file.name for each in folders for file in each.glob("*.py")} - {"__init__.py"}
    return [folder / name for name in sorted(names)]


def _describe(error: BaseException, file: Path) -> str:
    """FILE, line N: the mistake. The line is that of the config, or of a config that it imports."""
    text = " ".join(str(error).split())[:_LONGEST] or "no message"
    if isinstance(error, SyntaxError):
        line = f", line {error.lineno}" if error.lineno else ""
        return f"{error.filename or file}{line}: {type(error).__name__}: {error.msg}"
    if isinstance(error, OSError) and not traceback.extract_tb(error.__traceback__)[-1].filename.endswith(".py"):
        return f"--config={file} cannot be read: {error.strerror}"
    folder = file.resolve().parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else str(file)
    return f"{place}: {type(error).__name__}: {text}"
