"""The command around the server: flags, keys, addresses."""

import os
import signal
import socket

import pytest
import uvicorn
from absl import flags
from stub_run import stub_run

from gpt_jax import serve
from gpt_jax.cli import parse_flags
from gpt_jax.errors import UserError
from gpt_jax.signals import Interrupted


def check(*arguments: str) -> None:
    values = flags.FlagValues()
    serve.define_flags(values)
    parse_flags(["serve", *arguments], values)
    serve.FLAGS, before = values, serve.FLAGS
    try:
        serve.check_flags()
    finally:
        serve.FLAGS = before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--port=x", "must be a whole number"),
        ("--port=65536", "--port must be a whole number from 0 to 65535, found 65536"),
        ("--port=-1", "--port must be a whole number from 0"),
        ("--slots=0", "--slots must be a whole number from 1 to 1024, found 0"),
        ("--max_waiting=-1", "--max_waiting must be"),
        ("--max_clients=0", "--max_clients must be"),
        ("--max_body_kb=0", "--max_body_kb must be"),
        ("--timeout=0", "--timeout must be a number of seconds above 0, found 0.0"),
        ("--timeout=nan", "--timeout must be a number of seconds above 0, found nan"),
        ("--timeout=inf", "--timeout must be"),
        ("--body_timeout=-2", "--body_timeout must be"),
        ("--body_timeout=soon", "must be a number"),
        ("--host=a\0b", "--host must be text in UTF-8"),
        ("--model_name=\udcff", "--model_name must be text in UTF-8"),
        ("--cors=example.org", "--cors=example.org is no origin: give one such as https://example.org"),
        ("--cors=https://example.org/path", "is no origin"),
        ("--backend=cuda", "backend"),
        ("--nonsense=1", "nonsense"),
    ],
)
def test_a_flag_that_means_nothing_is_a_line(flag, message):
    with pytest.raises(UserError, match=message) as raised:
        check(flag)
    assert "\n" not in str(raised.value)


def test_flags_that_mean_something_pass():
    check("--port=0", "--cors=https://example.org", "--cors=*", "--timeout=0.5", "--api_key=x", "--host=::1")


def test_a_key_may_come_from_a_file(tmp_path):
    (tmp_path / "key").write_text(" sésame\n")
    assert serve.read_key(f"@{tmp_path / 'key'}") == "sésame"
    assert serve.read_key("open") == "open"
    assert serve.read_key(None) is None
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for value, message in (
        (f"@{tmp_path / 'none'}", "cannot be read: No such file"),
        (f"@{tmp_path}", "cannot be read: Is a directory"),
        (f"@{tmp_path / 'empty'}", "--api_key is empty"),
        (f"@{tmp_path / 'bytes'}", "is not text in UTF-8"),
        ("", "--api_key is empty"),
    ):
        with pytest.raises(UserError, match=message):
            serve.read_key(value)


def test_an_address_that_cannot_be_listened_at_is_a_line():
    with serve.bind("127.0.0.1", 0) as taken:
        taken.listen()
        assert serve.is_loopback(taken)
        assert serve.address_of(taken).startswith("http://127.0.0.1:")
        with pytest.raises(UserError, match=r"cannot listen at --host=127.0.0.1 --port=.*[Aa]ddress already in use"):
            serve.bind("127.0.0.1", taken.getsockname()[1])
    for host in ("192.0.2.1", "a..b", "x" * 70 + ".invalid"):
        with pytest.raises(UserError, match="cannot listen at"):
            serve.bind(host, 0)


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="there is no IPv6")
def test_addresses_of_six():
    try:
        listener = serve.bind("::1", 0)
    except UserError:
        pytest.skip("::1 is not up")
    with listener:
        assert serve.is_loopback(listener)
        assert serve.address_of(listener).startswith("http://[::1]:")


def test_a_wide_address_is_known_as_one():
    with serve.bind("0.0.0.0", 0) as listener:
        assert not serve.is_loopback(listener)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_and_leaves_by_way_of_all_that_is_open(number, monkeypatch):
    told = []
    monkeypatch.setattr(serve, "print", lambda line, **_: told.append(line), raising=False)
    values = flags.FlagValues()
    serve.define_flags(values)
    arguments = parse_flags(["serve", "a run", "--port=0"], values)
    monkeypatch.setattr(serve, "FLAGS", values)
    real = uvicorn.Server.main_loop

    async def signalled(server):
        signal.raise_signal(number)
        await real(server)

    monkeypatch.setattr(uvicorn.Server, "main_loop", signalled)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        with stub_run(lambda prompt, options: "an answer") as (run, _):
            monkeypatch.setattr(serve, "open_run", lambda *_, **__: run)
            monkeypatch.setattr(run, "warm_up", lambda: told.append("compiled"))
            with pytest.raises(Interrupted) as raised:
                serve.main(arguments)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert raised.value.number == number
    assert told[:3] == ["a stub; none", "compiling for prompts of every length, before it listens", "compiled"]
