"""Serves a trained model by OpenAI's protocol, with a page to chat: `python -m gpt_jax.serve RUN [--port=8000]`.

RUN is a run's folder, latest or best, and RUN@STEP another of its checkpoints; see `gpt_jax.runs.find`.
"""

from gpt_jax.signals import exit_on_interrupt, interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

from gpt_jax.cli import require_jax, run_main

if __name__ == "__main__":
    require_jax()  # before it is imported below

import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from gpt_jax.backend import print_device_error
from gpt_jax.config import BACKENDS, text_problem
from gpt_jax.config_file import NUMBER, WHOLE
from gpt_jax.errors import UserError
from gpt_jax.inference.served_run import open_run
from gpt_jax.storage.files import explain

FLAGS = flags.FLAGS
_LOOPBACK = ["localhost", "127.0.0.1", "::1"]
_BACKLOG = 2048  # connections that may wait to be accepted
_KEEP_ALIVE = 60  # seconds of an idle connection: clients give theirs up first, or one is closed as a request comes
_GRACE = 5  # seconds that open requests have when the server is stopped


def define_flags(flag_values: flags.FlagValues = FLAGS) -> None:
    here = {"flag_values": flag_values}
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 is reached from other machines.", **here)
    flags.DEFINE(WHOLE, "port", 8000, "Port to listen at; 0: any that is free.", **here)
    flags.DEFINE_enum("backend", None, BACKENDS, "Instead of the config's.", **here)
    flags.DEFINE_string("model_name", "", "The model's name for clients; the run's folder, if empty.", **here)
    flags.DEFINE_string("api_key", None, "Key that clients must send; @FILE reads it from a file.", **here)
    flags.DEFINE_multi_string("cors", [], "Origin of pages elsewhere that may use the server; '*': all.", **here)
    flags.DEFINE(WHOLE, "slots", 32, "Texts that are decoded side by side.", **here)
    flags.DEFINE(WHOLE, "max_waiting", 256, "Texts that may wait for a slot.", **here)
    flags.DEFINE(WHOLE, "max_clients", 1000, "Requests that may be open at a time.", **here)
    flags.DEFINE(WHOLE, "max_body_kb", 1024, "Kilobytes of a request at most.", **here)
    flags.DEFINE(NUMBER, "body_timeout", 30.0, "Seconds until a request must have come.", **here)
    flags.DEFINE(NUMBER, "timeout", 600.0, "Seconds until a request must be answered, and the answer read.", **here)


def check_flags() -> None:
    """Raises UserError for a flag whose value means nothing."""
    ranges = {"port": (0, 65535), "slots": (1, 1024), "max_waiting": (0, 10**6), "max_clients": (1, 10**6)}
    for name, (low, high) in {**ranges, "max_body_kb": (1, 2**20)}.items():
        if not low <= FLAGS[name].value <= high:
            raise UserError(f"--{name} must be a whole number from {low} to {high}, found {FLAGS[name].value}")
    for name in ("body_timeout", "timeout"):
        if not 0 < FLAGS[name].value < 1e9:
            raise UserError(f"--{name} must be a number of seconds above 0, found {FLAGS[name].value}")
    for name in ("host", "model_name", "api_key"):
        if problem := text_problem(FLAGS[name].value or ""):
            raise UserError(f"--{name} {problem}")
    for origin in FLAGS.cors:
        if origin != "*" and (origin.count("/") != 2 or not origin.startswith(("http://", "https://"))):
            raise UserError(f"--cors={origin} is no origin: give one such as https://example.org, or *")


def read_key(value: str | None) -> str | None:
    """The API key that a flag names.

    Raises:
      UserError: it is empty, or its file cannot be read.
    """
    if value is None:
        return None
    if value.startswith("@"):
        try:
            value = Path(value[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--api_key={value} cannot be read: {explain(error)}") from None
        except UnicodeDecodeError:
            raise UserError(f"--api_key={value} is not text in UTF-8") from None
    if not value.strip():
        raise UserError("--api_key is empty: give a key, @FILE, or leave the flag out")
    return value.strip()


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, at which nobody listens yet.

    Raises:
      UserError: the address is none, not this machine's, or in use.
    """
    with contextlib.ExitStack() as stack:
        try:
            [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            bound = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left is no obstacle
            bound.bind(address)
        except (OSError, UnicodeError) as error:  # UnicodeError: a host's name with an empty or too long part
            cause = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UserError(f"cannot listen at --host={host} --port={port}: {cause}; choose another") from None
        stack.pop_all()
        return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def main(argv: Sequence[str]) -> int:
    try:
        import uvicorn

        from gpt_jax.serving.app import make_app
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: install the `serve` extra (uv sync --extra serve)") from None
    from gpt_jax.serving.limits import Limits

    check_flags()
    key = read_key(FLAGS.api_key)
    limits = Limits(FLAGS.max_body_kb * 1024, FLAGS.body_timeout, FLAGS.timeout, FLAGS.max_clients)
    with contextlib.ExitStack() as stack:
        # First, so that a port in use costs no loading; it listens when the model is there.
        bound = stack.enter_context(bind(FLAGS.host, FLAGS.port))
        try:
            run = open_run(
                argv[1], stack, backend=FLAGS.backend or "", slots=FLAGS.slots, max_waiting=FLAGS.max_waiting
            )
            print(f"{run.description}; {run.backend}")
            print("compiling for prompts of every length, before it listens", flush=True)
            run.warm_up()
        except (RuntimeError, MemoryError) as error:
            return print_device_error(error)
        is_private = is_loopback(bound)
        app = make_app(
            run,
            limits,
            name=FLAGS.model_name,
            api_key=key,
            origins=FLAGS.cors,
            hosts=_LOOPBACK if is_private else ["*"],
        )
        bound.listen(_BACKLOG)
        print(f"{FLAGS.model_name or run.name} at {address_of(bound)} (a page to chat; API under /v1)", flush=True)
        if not is_private:
            who = "anyone who reaches it, with the key," if key else "anyone who reaches it, without a key,"
            print(f"warning: other machines reach this address; {who} may use it", file=sys.stderr, flush=True)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE,
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=_GRACE,
                server_header=False,
            )
        )
        # The server raises these again when it has stopped: the device is given up then, and the exit code tells of it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        server.run(sockets=[bound])
    return 0


def address_of(bound: socket.socket) -> str:
    """The URL of a socket, for people."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


if __name__ == "__main__":
    run_main(main, arguments=["RUN"], define=define_flags)
