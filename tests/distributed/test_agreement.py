"""Processes of a run compare what they are given before the first step: who has what of the first that differs."""

import types

import pytest
from meeting import everywhere, meet

from configs import chat
from gpt_jax import main
from gpt_jax.data.token_cache import Corpus
from gpt_jax.errors import UserError
from gpt_jax.training.train import hashes_of


@pytest.fixture(scope="module")
def two():
    processes = meet(2)
    yield processes
    everywhere(processes, lambda process: process.channel.close())


def difference(two, values) -> str:
    """The line with which both refuse values, by index."""

    def disagree(process):
        with pytest.raises(UserError) as caught:
            process.agree(values(process.index))
        return str(caught.value)

    (line,) = set(everywhere(two, disagree))
    assert line.endswith("all processes of a run need the same")
    assert "process 0 (pid " in line
    assert "process 1 (pid " in line
    return line


def needs(**changes):
    config = chat.get_config()
    config.update_from_flattened_dict(changes)
    return main.what_all_need(config)


def test_another_config_is_named_and_what_belongs_to_a_host_may_differ(two):
    line = difference(two, lambda index: needs(**{"optimizer.learning_rate": 1e-3 * (1 + index)}))
    assert line.startswith("config.optimizer.learning_rate is 0.001 for process 0 ")
    assert " and 0.002 for process 1 " in line
    hosts = [{"data.cache_dir": name, "devices": name, "distributed": name} for name in "ab"]
    everywhere(two, lambda process: process.agree(needs(**hosts[process.index])))


def test_another_version_and_another_program_are_named(two, monkeypatch, tmp_path):
    assert "the version of jax" in needs()
    with_other_jax = [needs(), needs() | {"the version of jax": "0.1"}]
    assert difference(two, with_other_jax.__getitem__).startswith("the version of jax is '0.")
    ours = needs()
    (tmp_path / "gpt_jax").mkdir()
    (tmp_path / "gpt_jax" / "main.py").write_text("another program")
    monkeypatch.setattr(main, "__file__", str(tmp_path / "gpt_jax" / "main.py"))
    programs = [ours, needs()]
    assert difference(two, programs.__getitem__).startswith("the checksum of the program is ")


def test_other_data_and_another_tokenizer_are_named(two):
    def hashes(fingerprint: str, text: str) -> dict[str, object]:
        return hashes_of(Corpus((), (), types.SimpleNamespace(to_str=lambda: text), fingerprint, {}, {}))

    data = [hashes(name, "t") for name in ("aa", "bb")]
    assert difference(two, data.__getitem__).startswith("the data's fingerprint is 'aa' for process 0 ")
    tokenizers = [hashes("aa", text) for text in ("t", "u")]
    assert difference(two, tokenizers.__getitem__).startswith("the checksum of the tokenizer is ")
