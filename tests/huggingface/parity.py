"""This package and transformers beside each other, in two processes. Run by scripts/huggingface.sh, in this order:

    transformers' Python   parity.py models FOLDER    makes random GPT-2, and records what they answer
    this package's         parity.py import FOLDER    reads them, on XLA and on a Vulkan device, and exports models
    transformers' Python   parity.py export FOLDER    reads the exports

or, of a run that was trained:

    this package's         parity.py export-run FOLDER RUN    exports it, and records its greedy answers
    transformers' Python   parity.py read-run FOLDER          answers the same questions

Logits are compared as they are, in f32 within 1e-4, and greedy texts token for token. In bf16 both round every
activation, each at places of its own: the one may be no more than twice as far from f32 as the other.
"""

import json
import sys
from pathlib import Path

import numpy as np

LIMIT = 1e-4  # of logits, in f32
NEW = 12  # tokens of a greedy text
GREEDY = 64  # of the answer of a run that was trained
MODELS = {  # of transformers: shape, stored type, greatest size of a file
    "chat": ({"n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 256, "vocab_size": 4000}, "float32", "5GB"),
    "sharded": (
        {"n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 500, "tie_word_embeddings": False},
        *("bfloat16", "200KB"),
    ),
    # The largest of GPT-2's vocabulary whose embedding a software device's buffer holds.
    "92m": ({"n_embd": 640, "n_head": 10}, "float32", "200MB"),
    "124m": ({}, "float32", "200MB"),
}
RUNS = {  # of ours: changes of configs/chat_gpt2.py, type and size of the export
    "tied": ({}, "float32", 10**9),
    "untied": ({"tie_head": False, "use_bias": False}, "float32", 10**9),
    "sharded": ({"embed_dim": 96, "mlp_dim": 200, "num_layers": 3, "norm_epsilon": 1e-3}, "float32", 10**5),
    "bfloat16": ({"tie_head": False}, "bfloat16", 10**9),
}
CHATS = [
    [("user", "What does it mean to live well?")],
    [
        ("system", "Be brief."),
        ("user", "Who's there?"),
        ("assistant", " A friend.\n"),
        ("user", "真 <|user|x|>  Enter!"),
    ],
]


def make_models(root: Path, names: list[str]) -> None:
    """Random GPT-2 with what transformers answers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    for name in names:
        shape, dtype, size = MODELS[name]
        torch.manual_seed(len(name))
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).to(getattr(torch, dtype)))
        folder = root / "models" / name
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=size)
        np.savez(folder / "answers.npz", **answers_of(model))


def answers_of(model) -> dict[str, np.ndarray]:
    """Logits of a text in f32 and in bf16, and the greedy continuation of its beginning."""
    import torch

    config = model.config
    rng = np.random.default_rng(1)
    texts = torch.tensor(rng.integers(1, config.vocab_size, (2, min(64, config.n_positions))))
    with torch.no_grad():
        model = model.float()
        made = model.generate(
            texts[:1, :8], max_length=None, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        high = model(texts).logits.numpy()
        low = model.bfloat16()(texts).logits.float().numpy()  # last: the weights are rounded from here on
    return {"texts": texts.numpy(), "f32": high, "bf16": low, "greedy": made[0, 8:].numpy()}


def import_models(root: Path, names: list[str]) -> None:
    """Reads transformers' models on both backends, then makes and exports models of ours."""
    from gpt_jax.huggingface.donor import read_donor
    from vk_kernels import BufferSizeError

    for name in names:
        folder = root / "models" / name
        donor, expected = read_donor(f"hf:{folder}"), np.load(folder / "answers.npz")
        print(donor.description)
        for backend in ("xla", "vulkan"):
            try:
                found = our_answers(donor.params, dict(donor.model), expected["texts"], backend)
            except BufferSizeError as error:  # the embedding of 124M is larger than a buffer of a software device
                print(f"import {name}, {backend}: NOT compared: {error}")
                continue
            compare(f"import {name}, {backend}", found, expected)
    for name, (model, dtype, most) in RUNS.items():
        export_run(root / "exports" / name, model, dtype, most)


def our_answers(params, model, texts: np.ndarray, backend_name: str) -> dict[str, np.ndarray]:
    """As `answers_of`, by a backend of ours."""
    import contextlib

    import jax.numpy as jnp

    from gpt_jax.backend import enter_backend
    from gpt_jax.inference.decoder import Decoder
    from gpt_jax.inference.generate import generate
    from gpt_jax.inference.sampling import SamplingOptions
    from gpt_jax.model.gpt import GPT, ModelConfig

    found = {}
    with contextlib.ExitStack() as stack:
        backend = enter_backend(backend_name, "highest", stack)
        for key, dtype in (("f32", "float32"), ("bf16", "bfloat16")):
            gpt = GPT(ModelConfig.from_config({**model, "dtype": dtype}))

            def logits(params, tokens, gpt=gpt):
                hidden = gpt.apply({"params": params}, tokens)
                matrix = params["wte"].T if gpt.config.tie_head else params["head"]
                return jnp.matmul(hidden, matrix.astype(hidden.dtype)).astype(jnp.float32)

            found[key] = np.asarray(backend.jit(logits)(backend.put(params), backend.put(texts.astype(np.int32))))
            if dtype == "float32":
                decoder = Decoder(gpt, backend.put(params), backend, slots=1)
                options = SamplingOptions(temperature=0.0, max_tokens=NEW)
                found["greedy"] = np.array(generate(decoder, [texts[0, :8].tolist()], [options])[0])
    return found


def compare(name: str, found: dict[str, np.ndarray], expected) -> None:
    """Prints the differences, and ends the process where one is too large."""
    difference = float(np.abs(found["f32"] - expected["f32"]).max())
    low, theirs = (float(np.abs(each["bf16"] - expected["f32"]).max()) for each in (found, expected))
    same = found["greedy"].tolist() == expected["greedy"].tolist()
    print(
        f"{name}: f32 {difference:.1e} of logits up to {np.abs(expected['f32']).max():.1f}; bf16 from f32 {low:.1e}, "
        f"the other's {theirs:.1e}; greedy {'the same' if same else 'DIFFERS'}",
        flush=True,
    )
    if difference > LIMIT or low > 2 * theirs + LIMIT or not same:
        sys.exit(f"{name}: too far from transformers")


def export_run(folder: Path, changes: dict, dtype: str, most: int) -> None:
    """Exports a random model of ours, with what it answers and the tokens of some chats beside it."""
    import jax

    from configs import chat_gpt2
    from gpt_jax.data.dialogue import Turn
    from gpt_jax.data.tokenizer import encode_prompt, train_tokenizer
    from gpt_jax.huggingface.donor import read_donor
    from gpt_jax.huggingface.export import write_model
    from gpt_jax.huggingface.model_card import Exported
    from gpt_jax.inference.conversation import with_system
    from gpt_jax.model.gpt import GPT, ModelConfig, init_params
    from gpt_jax.runs.load import RunData

    config = chat_gpt2.get_config()
    config.model.update(vocab_size=400, block_size=128, **changes)
    shapes = jax.eval_shape(lambda: init_params(GPT(ModelConfig.from_config(config.model)), 0))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: (0.08 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    tokenizer = train_tokenizer(["What does it mean to live well? Who's there? A friend. Enter!"] * 3, 400)
    run = RunData(folder, {}, config.to_dict(), {}, [], [], [])
    folder.mkdir(parents=True)
    write_model(folder, Exported(config, params, tokenizer, "random", run), dtype=dtype, most=most)
    back = read_donor(f"hf:{folder}")
    texts = rng.integers(3, 300, (2, 64))
    found = our_answers(back.params, dict(back.model), texts, "xla")
    chats = []
    for chat in CHATS:
        turns = [Turn(role, text.strip()) for role, text in chat if role != "system"]
        system = "".join(text for role, text in chat if role == "system")
        turns[0] = turns[0]._replace(text=with_system(system, turns[0].text))
        chats.append(encode_prompt(tokenizer, turns))
    np.savez(folder.with_suffix(".npz"), texts=texts, **found)
    folder.with_suffix(".json").write_text(json.dumps(chats))


def read_exports(root: Path, _: list[str]) -> None:
    """transformers reads what was exported: the same logits, greedy text and tokens of a chat."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in RUNS:
        folder = root / "exports" / name
        ours, chats = np.load(folder.with_suffix(".npz")), json.loads(folder.with_suffix(".json").read_text())
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = torch.tensor(ours["texts"])
        with torch.no_grad():
            low = model.bfloat16()(texts).logits.float().numpy()
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            made = model.generate(texts[:1, :8], max_new_tokens=NEW, do_sample=False, eos_token_id=None)
            theirs = {"f32": model(texts).logits.numpy(), "bf16": low, "greedy": made[0, 8:].numpy()}
        compare(f"export {name}", theirs, ours)
        for chat, expected in zip(CHATS, chats, strict=True):
            messages = [{"role": role, "content": text} for role, text in chat]
            found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            if found != expected:
                sys.exit(f"export {name}: {chat} is {found}, and here {expected}")
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        length = model.generate(**prompt, do_sample=False).shape[1]
        print(f"export {name}: chats have the tokens of training; generate went on to {length} of 128")


def export_trained(root: Path, names: list[str]) -> None:
    """Exports a run, and records how it answers its own prompts by the likeliest tokens, on the backend of its config.

    All is in f32: in bf16 two likeliest tokens may change places.
    """
    import contextlib

    import jax.numpy as jnp

    from gpt_jax.backend import enter_backend
    from gpt_jax.data.dialogue import Turn
    from gpt_jax.data.tokenizer import encode_prompt, marker_ids
    from gpt_jax.export import export
    from gpt_jax.inference.decoder import Decoder
    from gpt_jax.inference.generate import generate
    from gpt_jax.inference.load_model import load_for_sampling
    from gpt_jax.inference.sampling import SamplingOptions
    from gpt_jax.model.gpt import GPT, ModelConfig
    from gpt_jax.runs.find import find_run

    found = find_run(names[0])
    export(found, str(root / "model"), dtype="float32", most=10**12, force=False)
    checkpoint = None if found.checkpoint == found.workdir else found.checkpoint
    config, params, tokenizer, _ = load_for_sampling(found.workdir, checkpoint)
    gpt = GPT(ModelConfig.from_config({**config.model, "dtype": "float32"}))
    prompts = [encode_prompt(tokenizer, [Turn("user", text)]) for text in config.sample.prompts]
    most = min(GREEDY, config.model.block_size - max(map(len, prompts)))
    options = [SamplingOptions(temperature=0.0, max_tokens=most)] * len(prompts)

    def logits(params, tokens):
        hidden = gpt.apply({"params": params}, tokens)
        return jnp.matmul(hidden, params["wte"].T if gpt.config.tie_head else params["head"])

    with contextlib.ExitStack() as stack:
        backend = enter_backend(config.backend, "highest", stack)
        params = backend.put(params)
        decoder = Decoder(gpt, params, backend, slots=len(prompts))
        made = generate(decoder, prompts, options, end_tokens=marker_ids(tokenizer))
        given = [np.asarray([prompt + new], np.int32) for prompt, new in zip(prompts, made, strict=True)]
        high = [np.asarray(backend.jit(logits)(params, backend.put(tokens))) for tokens in given]
    print(f"{len(made)} answers, {backend}")
    np.savez(root / "logits.npz", *high)
    answers = [list(each) for each in zip(config.sample.prompts, prompts, made, strict=True)]
    (root / "answers.json").write_text(json.dumps({"most": most, "answers": answers}))


def read_trained(root: Path, _: list[str]) -> None:
    """transformers answers what the run was asked: the same tokens, logits within LIMIT times the largest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    logits, wrong = np.load(root / "logits.npz"), []
    asked = json.loads((root / "answers.json").read_text())
    for (prompt, given, made), ours in zip(asked["answers"], logits.values(), strict=True):
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            theirs = model(torch.tensor([given + made])).logits.numpy()
            found = model.generate(**inputs, max_length=None, max_new_tokens=asked["most"], do_sample=False)[0].tolist()
        difference, largest = float(np.abs(theirs - ours).max()), float(np.abs(theirs).max())
        same = found == given + made
        print(
            f"{prompt!r}: {len(made)} tokens, {'the same' if same else 'NOT THE SAME'}; logits within {difference:.1e} "
            f"of {largest:.1f}: {tokenizer.decode(made)!r}"
        )
        if not same or difference > LIMIT * largest:
            wrong.append(prompt)
    if wrong:
        sys.exit(f"other answers than transformers' to {wrong}")


STEPS = {
    "models": make_models,
    "import": import_models,
    "export": read_exports,
    "export-run": export_trained,
    "read-run": read_trained,
}

if __name__ == "__main__":
    STEPS[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:] or list(MODELS))
