"""Models that transformers saved, read as donors: they answer as they did there, or are refused in a line."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from gpt_jax.data.dialogue import MARKERS
from gpt_jax.data.names import is_hugging_face
from gpt_jax.data.tokenizer import encode, load, save, train_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.huggingface.donor import read_donor, with_markers
from gpt_jax.huggingface.tokenizer import CHAT_TEMPLATE
from gpt_jax.leaf_names import named_leaves
from gpt_jax.model.gpt import GPT, ModelConfig

MODELS = Path(__file__).parent / "models"
ANSWERS = json.loads((MODELS / "answers.json").read_text())


def logits_of(donor, tokens: np.ndarray) -> np.ndarray:
    """f32 (B, T, V) of all places."""
    model = GPT(ModelConfig.from_config(donor.model))

    @jax.jit
    def run(params, tokens):
        hidden = model.apply({"params": params}, tokens)
        matrix = params["wte"].T if donor.model["tie_head"] else params["head"]
        return jnp.dot(hidden, matrix, precision="highest")

    return np.asarray(run(donor.params, jnp.asarray(tokens, jnp.int32)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "untied", "old"])
def test_a_model_answers_as_transformers_recorded(name):
    donor, expected = read_donor(f"hf:{MODELS / name}"), ANSWERS[name]
    start = len(expected["tokens"][0]) - len(expected["greedy"])
    greedy = [*expected["tokens"][0][:start], *expected["greedy"]]
    logits = logits_of(donor, np.array([*expected["tokens"], greedy]))
    np.testing.assert_allclose(logits[:2, -2:], expected["logits"], atol=1e-5, rtol=0)
    # The tokens that greedy `generate` added are the likeliest after what stands before each.
    assert logits[2, start - 1 : -1].argmax(-1).tolist() == expected["greedy"]


def test_the_shape_is_that_of_its_config():
    assert read_donor(f"hf:{MODELS / 'untied'}").model == {
        "vocab_size": 33,
        "block_size": 16,
        "num_layers": 1,
        "num_heads": 3,
        "embed_dim": 12,
        "mlp_dim": 20,
        "norm_epsilon": 0.01,
        "dropout_rate": 0.2,
        "soft_cap": 0.0,
        "use_bias": True,
        "tie_head": False,
    }
    old = read_donor(str(MODELS / "old"))
    assert (old.model["mlp_dim"], old.model["tie_head"], old.model["dropout_rate"]) == (0, True, 0.1)
    assert "embd_pdrop 0.1" in old.notes[0]
    assert "stored as F16" in old.description


def test_a_donor_is_told_by_its_prefix():
    assert is_hugging_face("hf:gpt2")
    assert not is_hugging_face("runs/hf")


def test_the_first_kind_of_tokenizer_is_read_and_given_the_markers(tmp_path):
    donor = read_donor(f"hf:{MODELS / 'old'}")
    assert donor.tokenizer.encode("the moon<|endoftext|>").ids[-1] == 0
    assert (donor.end_of_text, donor.missing) == ("<|endoftext|>", MARKERS)
    ready = with_markers(donor)
    size = donor.tokenizer.get_vocab_size()
    user, assistant, end = (ready.tokenizer.token_to_id(marker) for marker in MARKERS)
    assert (user, assistant, end) == (size, size + 1, size + 2)
    assert ready.model["vocab_size"] == max(262, size + 3) == len(ready.params["wte"])
    np.testing.assert_array_equal(ready.params["wte"][:size], donor.params["wte"][:size])
    np.testing.assert_array_equal(ready.params["wte"][end], donor.params["wte"][0])
    for marker, word in ((user, "user"), (assistant, "assistant")):  # not one row for both, which adapters would keep
        rows = donor.params["wte"][donor.tokenizer.encode(word).ids]
        np.testing.assert_allclose(ready.params["wte"][marker], rows.mean(0), rtol=1e-6)
    assert np.abs(ready.params["wte"][user] - ready.params["wte"][assistant]).max() > 1e-3
    assert ready.notes[-1].startswith(f"its tokenizer lacks {', '.join(MARKERS)}: their rows begin as")
    assert donor.tokenizer.token_to_id("<|user|>") is None  # what was read stays as it is
    save(ready.tokenizer, tmp_path / "tokenizer.json")
    text = "the <|user|> moon"
    assert encode(load(tmp_path / "tokenizer.json"), text) == donor.tokenizer.encode(text).ids


def test_a_tokenizer_that_cannot_spell_the_markers_words_gives_them_the_mean_row():
    donor = read_donor(f"hf:{MODELS / 'old'}")
    small = Tokenizer(models.BPE({"b": 0, "c": 1}, []))
    ready = with_markers(dataclasses.replace(donor, tokenizer=small, end_of_text=None))
    for marker in MARKERS:
        row = ready.params["wte"][ready.tokenizer.token_to_id(marker)]
        np.testing.assert_allclose(row, donor.params["wte"][:2].mean(0), rtol=1e-6)


def test_a_tokenizer_with_the_markers_stays_as_it_is(tmp_path):
    folder = copy("old", tmp_path)
    save(train_tokenizer(["a small text"], 262), folder / "tokenizer.json")
    donor = read_donor(f"hf:{folder}")
    assert donor.missing == ()
    assert with_markers(donor) is donor


def test_a_base_model_and_one_with_a_head_have_the_same_parameters(tmp_path):
    """Names with `transformer.` and without, with the tied head written out and without it."""
    folder = copy("tied", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**bare, "lm_head.weight": bare["wte.weight"]}, folder / "model.safetensors")
    ours, theirs = (named_leaves(read_donor(str(each)).params) for each in (folder, MODELS / "tied"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def copy(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(MODELS / name, folder / name))


def change_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    kept = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in kept.items() if value != "absent"}))


def change_tensors(folder: Path, change) -> None:
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BAD_CONFIGS = [
    ({"model_type": "llama"}, "model_type is 'llama', and only models of type 'gpt2'"),
    ({"model_type": "absent"}, "model_type is None"),
    ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ({"add_cross_attention": True}, "add_cross_attention is true, which the model here cannot"),
    ({"quantization_config": {"bits": 4}}, "it has a quantization_config"),
    ({"n_layer": "two"}, "n_layer cannot be text"),
    ({"n_layer": 0}, "n_layer must be a whole number from 1"),
    ({"n_head": 3}, "n_embd must be a multiple of n_head, found 8 and 3"),
    ({"n_layer": 3}, "no tensor h.2.ln_1.weight"),
    ({"n_layer": 1}, "h.1.attn.c_attn.bias"),
    ({"n_positions": 17}, r"wpe.weight has the shape \(16, 8\), and by its config.json \(17, 8\)"),
    ({"tie_word_embeddings": False}, "no tensor lm_head.weight"),
]


@pytest.mark.parametrize(("values", "message"), BAD_CONFIGS, ids=[message[:30] for _, message in BAD_CONFIGS])
def test_a_config_that_the_model_here_cannot_follow_is_refused(values, message, tmp_path):
    folder = copy("tied", tmp_path)
    change_config(folder, **values)
    with pytest.raises(UserError, match=message):
        read_donor(str(folder))


def poison(tensors):
    tensors["transformer.ln_f.bias"] = np.full(8, np.nan, np.float32)


def quantize(tensors):
    tensors["transformer.ln_f.bias"] = np.zeros(8, np.int8)


def untie(tensors):
    tensors["lm_head.weight"] = np.zeros((40, 8), np.float32)


def name_it_twice(tensors):
    tensors["wte.weight"] = tensors["transformer.wte.weight"] + 1


def add_a_classifier(tensors):
    tensors["score.weight"] = np.zeros((2, 8), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison, "8 of the 8 numbers of the parameter ln_f/bias are NaN or infinite"),
        (quantize, "ln_f.bias is of type I8, and only F32, BF16, F16 are read"),
        (untie, 'lm_head.weight is not wte.weight, .* put "tie_word_embeddings": false'),
        (name_it_twice, "wte.weight is there with 'transformer.' before it as well: remove one of the two"),
        (add_a_classifier, "score.weight has no place in a GPT-2"),
    ],
)
def test_tensors_that_mean_nothing_here_are_named(change, message, tmp_path):
    folder = copy("tied", tmp_path)
    change_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        read_donor(str(folder))


def test_a_folder_that_is_no_whole_model_is_refused(tmp_path):
    folder = copy("untied", tmp_path)
    index = folder / "model.safetensors.index.json"
    map_of = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**map_of["weight_map"], "x": "../config.json"}}))
    with pytest.raises(UserError, match=r"x is in '\.\./config.json', which is no name of a file beside it"):
        read_donor(str(folder))
    index.write_text(json.dumps(map_of))
    part = sorted(folder.glob("*.safetensors"))[0]
    whole = part.read_bytes()
    save_file({**load_file(part), "surprise": np.zeros(1, np.float32)}, part)
    with pytest.raises(UserError, match=f"{part.name} has surprise, which model.safetensors.index.json does not name"):
        read_donor(str(folder))
    part.write_bytes(whole)
    part.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=f"{part.name} is damaged: "):
        read_donor(str(folder))
    part.unlink()
    with pytest.raises(UserError, match=f"{part.name} is missing: put it back"):
        read_donor(str(folder))
    for file in [index, *folder.glob("*.safetensors")]:
        file.unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors, nor"):
        read_donor(str(folder))
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"but pytorch_model.bin, which is not read here; convert it .*save_pretrained"):
        read_donor(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:", "hf: names no model"),
        ("hf:./absent", "hf:./absent: there is no folder absent"),
        ("hf:a/b/c", "there is no folder a/b/c"),
    ],
)
def test_a_name_of_no_model_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        read_donor(name)


def test_a_run_is_told_from_a_model_of_transformers(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is a run of this program, and no model of transformers: leave out hf:"):
        read_donor(f"hf:{tmp_path}")


def test_a_name_that_the_hub_does_not_give_costs_one_line(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot find it.\nSecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"hub did not give a model of that name: Cannot find it\.$"):
        read_donor("hf:owner/name")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    folder = copy("tied", tmp_path)
    save(train_tokenizer(["a small text"], 262), folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"its tokenizer has a token of number 2.., and its config.json a vocab"):
        read_donor(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read as a tokenizer"):
        read_donor(str(folder))


def test_scores_that_are_scaled_by_the_layer_are_those_of_a_smaller_query(tmp_path):
    folder = copy("tied", tmp_path)
    change_config(folder, scale_attn_by_inverse_layer_idx=True)
    plain, scaled = (named_leaves(read_donor(str(each)).params) for each in (MODELS / "tied", folder))
    for name, leaf in plain.items():
        factor = np.ones(leaf.shape[-1], np.float32)
        if name.startswith("h_1/qkv/"):
            factor[:8] = 0.5  # the second layer's query
        np.testing.assert_array_equal(scaled[name], leaf * factor, err_msg=name)


def test_one_file_is_preferred_to_an_index_as_by_transformers(tmp_path):
    folder = copy("untied", tmp_path)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors | {"lm_head.weight": np.ones((33, 12), np.float32)}, folder / "model.safetensors")
    assert (read_donor(str(folder)).params["head"] == 1).all()


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_of_its_own_is_told_of(file, tmp_path):
    folder = copy("untied", tmp_path)
    for template, told in ((CHAT_TEMPLATE, False), ("{{ messages }}", True)):
        (folder / file).write_text(template if file.endswith("jinja") else json.dumps({"chat_template": template}))
        assert any("chat template is not used" in note for note in read_donor(str(folder)).notes) == told


def test_bfloat16_is_read_bit_for_bit():
    stored = {}
    for file in (MODELS / "untied").glob("*.safetensors"):
        stored |= load_file(file)
    taken = read_donor(str(MODELS / "untied")).params
    assert stored["lm_head.weight"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(taken["head"], stored["lm_head.weight"].astype(np.float32).T)
