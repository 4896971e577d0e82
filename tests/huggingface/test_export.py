"""Runs exported for transformers: what comes back is what went, and a failure half way leaves nothing."""

import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import fsspec
import jax
import jinja2.sandbox
import ml_dtypes
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tiny_run import tiny
from untrained_run import write_untrained_run

from configs import chat_gpt2
from gpt_jax.data.dialogue import ASSISTANT, END, USER, Dialogue, Turn
from gpt_jax.data.tokenizer import encode, encode_dialogues, encode_prompt, marker_ids, train_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.export import export
from gpt_jax.huggingface import export as export_module
from gpt_jax.huggingface.donor import read_donor
from gpt_jax.huggingface.export import parse_size, write_model
from gpt_jax.huggingface.gpt2 import tensor_shapes
from gpt_jax.huggingface.model_card import Exported, model_card
from gpt_jax.huggingface.tokenizer import CHAT_TEMPLATE
from gpt_jax.inference.conversation import with_system
from gpt_jax.leaf_names import named_leaves
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.runs.find import find_run
from gpt_jax.runs.load import RunData
from gpt_jax.storage.files import StorageError, os_error_of
from gpt_jax.storage.upload import SUMS, sha256

TOKENIZER = train_tokenizer(["a question and an answer, another question"] * 3, 270)
OPTIONS = {"dtype": "float32", "most": 10**9, "force": False}
FILES = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    "tokenizer_config.json",
}


def exported(**model) -> Exported:
    """A model of random numbers, with nothing of a run around it."""
    config = tiny(Path("corpus"), **{f"model__{name}": value for name, value in {"soft_cap": 0.0, **model}.items()})
    shapes = jax.eval_shape(lambda: init_params(GPT(ModelConfig.from_config(config.model)), 0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    run = RunData(Path("nowhere"), {}, config.to_dict(), {}, [], [], [])
    return Exported(config, params, TOKENIZER, "a checkpoint", run)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "chat"
    return write_untrained_run(folder, model__soft_cap=0.0, model__use_bias=True, model__tie_head=True)


@pytest.mark.parametrize(
    ("model", "most"),
    [
        ({"tie_head": True, "use_bias": True}, 10**9),
        ({"tie_head": False, "use_bias": False, "mlp_dim": 24, "norm_epsilon": 1e-3, "num_layers": 2}, 2000),
    ],
    ids=["tied", "untied, no biases, in several files"],
)
def test_a_model_comes_back_bit_for_bit(model, most, tmp_path):
    sent = exported(**model)
    write_model(tmp_path, sent, dtype="float32", most=most)
    assert (tmp_path / "model.safetensors").exists() == (most == 10**9)
    back = read_donor(f"hf:{tmp_path}")
    ours, theirs = named_leaves(sent.params), named_leaves(back.params)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    wanted = {name: value for name, value in sent.config.model.items() if name not in ("dtype", "remat")}
    assert dict(back.model) == wanted
    assert back.tokenizer.to_str() == TOKENIZER.to_str()
    assert (back.missing, back.end_of_text, back.notes) == ((), END, ())


def test_the_config_says_what_transformers_needs_to_know(tmp_path):
    write_model(tmp_path, exported(tie_head=False), dtype="bfloat16", most=10**9)
    config, generation, tokenizer = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    user, assistant, end = marker_ids(TOKENIZER)
    assert (config["model_type"], config["tie_word_embeddings"], config["dtype"]) == ("gpt2", False, "bfloat16")
    assert config["n_positions"] == config["n_ctx"] == 16  # the second is llama.cpp's name
    assert (config["bos_token_id"], config["eos_token_id"]) == (end, end)
    assert generation["eos_token_id"] == [end, user, assistant]
    assert generation["max_length"] == 16
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert not stored["transformer.h.0.mlp.c_fc.bias"].any()  # GPT-2 has biases, and this model none


def rendered(messages, **options) -> list[int]:
    """The tokens of transformers' `apply_chat_template`: it renders in such an environment, and then encodes."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    text = environment.from_string(CHAT_TEMPLATE).render(messages=messages, **options)
    reader = type(TOKENIZER).from_str(TOKENIZER.to_str())  # in which a marker of the text is one
    return reader.encode(text, add_special_tokens=False).ids


def test_the_chat_template_makes_the_tokens_of_training():
    turns = [Turn("user", "a question\n\n{{ 1 }}"), Turn("assistant", "an <answer>"), Turn("user", "真 another")]
    messages = [{"role": role, "content": f" {text}\n"} for role, text in turns]
    assert rendered(messages, add_generation_prompt=True) == encode_prompt(TOKENIZER, turns)
    turns.append(Turn("assistant", "yes"))
    messages.append({"role": "assistant", "content": "yes"})
    ((ids, _),) = encode_dialogues(TOKENIZER, [Dialogue("", tuple(turns))])
    assert rendered(messages) == ids.tolist()
    system = [{"role": "system", "content": "Be brief. "}, {"role": "developer", "content": "Please."}]
    first = turns[0]._replace(text=with_system("Be brief.\n\nPlease.", turns[0].text))
    assert rendered([*system, *messages[:1]], add_generation_prompt=True) == encode_prompt(TOKENIZER, [first])
    opened = [Turn("user", "Be brief."), Turn("assistant", "yes")]  # the system's text is the turn of the user
    ((ids, _),) = encode_dialogues(TOKENIZER, [Dialogue("", tuple(opened))])
    assert rendered([system[0], messages[3]]) == ids.tolist()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([("user", "a"), ("user", "b")], "user and assistant must speak by turns"),
        ([("user", "a"), ("system", "b")], "a system message can only come first"),
        ([("tool", "a")], "found tool"),
        ([("user", " ")], "a message is empty"),
    ],
)
def test_the_chat_template_refuses_what_training_would(messages, message):
    with pytest.raises(jinja2.TemplateError, match=message):
        rendered([{"role": role, "content": text} for role, text in messages])


@pytest.mark.slow
def test_a_checkpoint_of_a_run_is_exported_with_its_card(run, tmp_path, capsys):
    target = tmp_path / "models" / "chat"
    export(find_run(f"{run}@2"), str(target), **OPTIONS)
    assert {file.name for file in target.iterdir()} == FILES
    assert len({file.stat().st_mode for file in target.iterdir()}) == 1
    assert os.listdir(target.parent) == ["chat"]
    assert capsys.readouterr().out == f"exported the checkpoint {run}/checkpoints/2 to {target}, in float32\n"
    card = (target / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\n')
    assert "- exported from: the checkpoint checkpoints/2" in card
    assert str(run) not in card  # it is for others: no path of this machine
    with pytest.raises(UserError, match=r"chat is not empty: give another folder, or --force to replace its model"):
        export(find_run(str(run)), str(target), **OPTIONS)
    before = (target / "model.safetensors").read_bytes()
    export(find_run(str(run)), str(target), dtype="bfloat16", most=2000, force=True)
    assert not (target / "model.safetensors").exists()
    assert read_donor(str(target)).description.endswith("stored as BF16")
    export(find_run(f"{run}@2"), str(target), dtype="float32", most=10**9, force=True)
    assert (target / "model.safetensors").read_bytes() == before
    assert {file.name for file in target.iterdir()} == FILES
    (target / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes.txt, which is no file of a model, and is not replaced"):
        export(find_run(str(run)), str(target), dtype="float32", most=10**9, force=True)
    (target / "notes.txt").unlink()
    (target / "README.md").unlink()
    (target / "README.md").mkdir()  # which may hold anything
    with pytest.raises(UserError, match=r"holds README.md, which is no file of a model, and is not replaced"):
        export(find_run(str(run)), str(target), dtype="float32", most=10**9, force=True)


def test_the_card_says_what_was_trained_on_what():
    config = chat_gpt2.get_config()
    config.update_from_flattened_dict(
        {
            "init_from": "/home/somebody/runs/donor/checkpoints/5",
            "lora.rank": 4,
            "data.mixture": ("/home/somebody/chats.jsonl", "hf:owner/set:train"),
            "data.weights": (3.0, 1.0),
            "data.validation": "/home/somebody/held_out.jsonl",
        }
    )
    data = {"train": {"dialogues": 1500, "tokens": 70_000}, "validation": {"dialogues": 80, "tokens": 3_000}}
    run = RunData(Path("runs/x"), {"parameters": 99, "data": data}, config.to_dict(), {}, [], [], [])
    params = {"wte": np.zeros((6, 2), np.float32)}
    exported = Exported(config, params, None, "the checkpoint 5", run)
    card = model_card(exported, "float32")
    for line in (
        'datasets: ["owner/set"]',
        "- parameters: 12",  # adapters are merged, and no part of them
        "- data: chats.jsonl (weight 3), hf:owner/set:train (weight 1); validation on held_out.jsonl",
        "- train data: 1,500 dialogues, 70,000 tokens",
        "- validation data: 80 dialogues, 3,000 tokens",
        "- trained: adapters (LoRA) of rank 4, merged into what they stand beside",
    ):
        assert line in card.splitlines()
    assert "somebody" not in card
    base = model_card(dataclasses.replace(exported, trained=False), "float32")
    assert "Training" not in base
    assert "owner/set" not in base


@pytest.mark.parametrize("stands", [False, True], ids=["new", "in the place of another"])
def test_an_export_that_fails_half_way_leaves_what_was_there(stands, run, tmp_path, monkeypatch):
    target = tmp_path / "chat"
    if stands:
        export(find_run(str(run)), str(target), **OPTIONS)
    before = {file.name: file.read_bytes() for file in target.iterdir()} if stands else {}

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_module, "save_tokenizer", fail)
    with pytest.raises(StorageError, match=r"tokenizer.json: No space left on device; free some space there"):
        export(find_run(f"{run}@2"), str(target), **OPTIONS | {"force": stands})
    assert os.listdir(tmp_path) == (["chat"] if stands else [])
    assert before == ({file.name: file.read_bytes() for file in target.iterdir()} if stands else {})


def test_what_a_kill_left_is_cleared_away_by_the_next_export(run, tmp_path):
    target = tmp_path / "chat"
    export(find_run(str(run)), str(target), **OPTIONS)
    target.rename(tmp_path / ".chat.old")  # between the two renames
    (tmp_path / ".chat.new").mkdir()
    (tmp_path / ".chat.new" / "model.safetensors").touch()
    with pytest.raises(UserError, match="chat is not empty"):  # it stands at its place again
        export(find_run(str(run)), str(target), **OPTIONS)
    export(find_run(str(run)), str(target), **OPTIONS | {"force": True})
    assert os.listdir(tmp_path) == ["chat"]


def test_an_error_of_safetensors_tells_of_the_disk():
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert os_error_of(error).errno == errno.ENOSPC


def test_a_soft_cap_is_refused_with_what_mends_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    config = tiny(tmp_path / "corpus")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(UserError, match=r"soft_cap is 30, .*--config=configs/chat_gpt2.py, or .*model.soft_cap=0"):
        export(find_run(str(folder)), str(tmp_path / "out"), **OPTIONS)  # before it looks for a checkpoint
    with pytest.raises(UserError, match=r"run has no adapters, since its config.lora.rank is 0: leave out --adapter"):
        export(find_run(str(folder)), str(tmp_path / "out"), adapter=True, **OPTIONS)  # whatever else is in the way
    assert not (tmp_path / "out").exists()


def test_a_number_that_float16_cannot_hold_is_named(tmp_path):
    sent = exported()
    sent.params["ln_f"]["scale"][3] = 1e6
    with pytest.raises(UserError, match=r"transformer.ln_f.weight has numbers that float16 cannot hold"):
        write_model(tmp_path, sent, dtype="float16", most=10**9)


def test_the_config_for_export_is_the_reference_run_as_a_gpt2():
    model = ModelConfig.from_config(chat_gpt2.get_config().model)
    count = sum(math.prod(shape) for shape in tensor_shapes(model).values())
    assert f"{count:,} parameters" in chat_gpt2.__doc__
    assert (model.soft_cap, model.tie_head, model.use_bias) == (None, True, True)


def test_a_url_gets_the_files_and_their_checksums_last(run, tmp_path, monkeypatch):
    written = []
    put, pipe = LocalFileSystem.put_file, LocalFileSystem.pipe_file
    monkeypatch.setattr(LocalFileSystem, "put_file", lambda self, a, b: written.append(Path(b).name) or put(self, a, b))
    monkeypatch.setattr(
        LocalFileSystem, "pipe_file", lambda self, a, b: written.append(Path(a).name) or pipe(self, a, b)
    )
    store, url = tmp_path / "store", f"file://{tmp_path}/store"
    export(find_run(str(run)), url, **OPTIONS)
    assert written == [*sorted(FILES), SUMS]
    sums = dict(line.split("  ")[::-1] for line in (store / SUMS).read_text().splitlines())
    assert sums == {name: sha256(store / name) for name in FILES}
    with pytest.raises(UserError, match=r"store is not empty, it has README.md: give another place, or --force"):
        export(find_run(str(run)), url, **OPTIONS)
    export(find_run(str(run)), url, dtype="float32", most=2000, force=True)
    assert not (store / "model.safetensors").exists()  # of the model that was replaced
    assert read_donor(str(store)).tokenizer.to_str() == TOKENIZER.to_str()
    (store / "years").mkdir()
    (store / "years" / "notes.txt").write_text("of work")
    with pytest.raises(UserError, match=r"store holds years/notes.txt, which is no file of a model, and is not repl"):
        export(find_run(str(run)), url, dtype="float32", most=2000, force=True)
    assert (store / "years" / "notes.txt").read_text() == "of work"


def test_an_upload_that_fails_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    put = LocalFileSystem.put_file

    def fail(self, local, remote):
        if remote.endswith("model.safetensors"):
            raise OSError("connection reset")
        put(self, local, remote)

    monkeypatch.setattr(LocalFileSystem, "put_file", fail)
    with pytest.raises(StorageError, match=r"store cannot be written: connection reset"):
        export(find_run(str(run)), f"file://{tmp_path}/store", **OPTIONS)
    assert os.listdir(tmp_path / "store") == []


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("", "--to is empty: name a folder"),
        ("s3://", "s3:// names no place: give s3://BUCKET/FOLDER"),
        ("nowhere://a/b", "Protocol not known: nowhere"),
        ("README.md", "README.md is no folder"),
    ],
)
def test_a_target_that_is_none_is_refused(to, message, run):
    with pytest.raises(UserError, match=message):
        export(find_run(str(run)), to, **OPTIONS)


def test_a_store_without_its_package_is_named(run, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"a package that is not installed: Install s3fs .*uv pip install s3fs"):
        export(find_run(str(run)), "s3://bucket/chat", **OPTIONS)


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "200MB", "1.5kb", "1000")] == [5 * 10**9, 2 * 10**8, 1500, 1000]
    for text in ("", "GB", "0", "-1", "5XB", "9999999TB"):
        with pytest.raises(UserError, match=r"--max_shard_size must be a size such as 5GB"):
            parse_size(text)


def test_markers_are_single_tokens_of_the_template():
    assert [TOKENIZER.token_to_id(marker) for marker in (USER, ASSISTANT, END)] == list(marker_ids(TOKENIZER))
    assert encode(TOKENIZER, USER) != [marker_ids(TOKENIZER)[0]]
