"""Explains a device or its memory that fails: one line with what happened and which values of the config help."""

from typing import Any

from ml_collections import ConfigDict

from vk_kernels import BufferSizeError, DeviceLostError, DeviceTimeoutError, FeatureError, VulkanError

# A driver with a watchdog gives a device up after 2 seconds (Windows) to 10 (Linux) of one submission.
LONG_STEP = 0.5  # seconds; in a longer one the watchdog may well be why a device was lost
SUBMIT_MS = 500.0  # that is suggested then


class TrainingFailed(RuntimeError):
    """The run cannot go on: its message is one line that says why."""


def remedies(error: BaseException, config: ConfigDict, step_seconds: float | None = None) -> str:
    """Names the values of a config that would help. step_seconds: that a step took until now; None: not measured."""
    sizes = config.batch_size, config.model.block_size
    batch = "a smaller config.batch_size (now {}) or config.model.block_size ({})".format(*sizes)
    if isinstance(error, DeviceLostError):
        submit_ms = config.vulkan.submit_ms
        cut = f"--config.vulkan.submit_ms={submit_ms / 2 or SUBMIT_MS:g} cuts it into shorter submissions"
        took = "" if step_seconds is None else f" (the last took {1e3 * step_seconds:.0f} ms)"
        if step_seconds is not None and step_seconds < LONG_STEP:
            short = f"a step seems too short for a driver's watchdog{took}; if that ended it all the same"
            return f"{short}, {cut}, and {batch} makes it shorter"
        return f"the driver may have ended a long step{took}: {cut}, and {batch} makes it shorter"
    if isinstance(error, DeviceTimeoutError):
        return f"{batch} makes a step shorter"
    if isinstance(error, VulkanError) and not isinstance(error, (MemoryError, BufferSizeError)):
        return "--config.backend=xla trains without Vulkan"
    more = ""
    if config.accumulate_steps < config.batch_size:
        more += f", a larger config.accumulate_steps ({config.accumulate_steps})"
    if config.model.dtype == "float32":
        more += ", config.model.dtype=bfloat16"
    what = "make arrays smaller" if isinstance(error, BufferSizeError) else "take less memory"
    return f"these {what}: {batch}{more}"


def remedies_of_model(error: BaseException, config: ConfigDict) -> str:
    """Names the values that would help where no batch and no dtype does."""
    xla = "--config.backend=xla, which trains without Vulkan"
    if isinstance(error, FeatureError):
        return xla
    tried = "" if config.batch_size == 1 else "config.batch_size=1 and more config.accumulate_steps are not enough: "
    return f"{tried}a smaller config.model.block_size, embed_dim or vocab_size, or {xla}"


def smaller(config: ConfigDict) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Changes to a config that need less memory and leave the model as it is, the least change first.

    Returns:
      More accumulate_steps, which change no more than rounding and the bits of dropout; and a smaller batch_size.
    """
    batch, parts = config.batch_size, config.accumulate_steps
    in_more_parts = [{"accumulate_steps": parts * n} for n in _divisors(batch // parts)]
    whole = {} if parts == 1 else {"accumulate_steps": 1}
    return in_more_parts, [{"batch_size": batch // n, **whole} for n in _divisors(batch)]


def _divisors(number: int) -> list[int]:
    """Divisors above 1, each at least twice the one before, but for the number itself, which is the last."""
    found = [1]
    for n in range(2, number):
        if number % n == 0 and n >= 2 * found[-1]:
            found.append(n)
    return [*found[1:], number] if number > 1 else []
