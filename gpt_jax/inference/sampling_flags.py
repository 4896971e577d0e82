"""Sampling options as flags of a command; those that are given take the place of the run's own."""

import dataclasses
from collections.abc import Sequence

from absl import flags

from gpt_jax.config_file import NUMBER, WHOLE
from gpt_jax.inference.sampling import OPTION_FIELDS, SamplingOptions


def define_sampling_flags(flag_values: flags.FlagValues, names: Sequence[str], seed: str) -> None:
    """Defines a flag for each of these options, numbers all; seed: what the help says of that one."""
    for name in names:
        field = OPTION_FIELDS[name]
        text = seed if name == "seed" else f"Instead of the config's: {field.meaning}."
        flags.DEFINE(WHOLE if field.kind is int else NUMBER, name, None, text, flag_values=flag_values)


def options_of_flags(flag_values: flags.FlagValues, options: SamplingOptions) -> SamplingOptions:
    """The options with the flags' in their place.

    Raises:
      UserError: a flag has an impossible value.
    """
    names = [name for name in OPTION_FIELDS if name in flag_values and flag_values[name].value is not None]
    given = {name: flag_values[name].value for name in names}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    options = dataclasses.replace(options, **given)
    options.check(called="--{}")
    return options
