"""Makes the models beside this file with transformers, and records what they answer. Run by scripts/huggingface.sh.

    python tests/huggingface/make_models.py [FOLDER]

Three random GPT-2 of a few thousand parameters: `tied`, as transformers saves one today, in f32; `untied`, with its own
head, another MLP, attention that is not scaled, in bf16 and in several files; `old`, the names, masks and tokenizer
files of the first folders, in f16. answers.json has logits of each for two texts, and what greedy `generate` adds.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

BLOCK, PROMPT = 16, 5
COMMON = {"n_positions": BLOCK, "bos_token_id": 0, "eos_token_id": 0}
SHAPES = {
    "tied": {"vocab_size": 40, "n_embd": 8, "n_layer": 2, "n_head": 2},
    "untied": {
        "vocab_size": 33,
        "n_embd": 12,
        "n_layer": 1,
        "n_head": 3,
        "n_inner": 20,
        "layer_norm_epsilon": 0.01,
        "scale_attn_weights": False,
        "tie_word_embeddings": False,
        "activation_function": "gelu_pytorch_tanh",
        "resid_pdrop": 0.2,
        "attn_pdrop": 0.2,
        "embd_pdrop": 0.0,
    },
    "old": {"vocab_size": 262, "n_embd": 4, "n_layer": 3, "n_head": 1},
}
DTYPES = {"tied": torch.float32, "untied": torch.bfloat16, "old": torch.float16}


def make(name: str) -> GPT2LMHeadModel:
    """A random model whose numbers are those of its stored type."""
    torch.manual_seed(sum(map(ord, name)))
    model = GPT2LMHeadModel(GPT2Config(**COMMON, **SHAPES[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.4 * torch.randn_like(parameter)).to(DTYPES[name]))
    return model


def save_old(model: GPT2LMHeadModel, folder: Path) -> None:
    """The folder as of 2019: names without `transformer.`, causal masks, vocab.json and merges.txt."""
    tensors = {key.removeprefix("transformer."): value.half().numpy() for key, value in model.state_dict().items()}
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items() if key != "lm_head.weight"}
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, BLOCK, BLOCK), np.uint8))
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kept = {"model_type": "gpt2", "n_ctx": BLOCK, **COMMON, **SHAPES["old"], "activation_function": "gelu_new"}
    (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=262,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the moon and the sun and the sea"] * 2, trainer)
    tokenizer.model.save(str(folder))


def main(root: Path) -> None:
    answers = {}
    for name in SHAPES:
        model, folder = make(name), root / name
        if name == "old":
            save_old(model, folder)
        else:
            size = "1KB" if name == "untied" else "5GB"
            model.to(DTYPES[name]).save_pretrained(folder, max_shard_size=size)
            (folder / "generation_config.json").unlink()
            model = model.float()
        texts = torch.randint(1, SHAPES[name]["vocab_size"], (2, BLOCK), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = model(texts).logits.numpy()
        made = model.generate(
            texts[:1, :PROMPT], max_length=BLOCK, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
        )
        answers[name] = {
            "tokens": texts.tolist(),
            "logits": [[[float(f"{x:.7g}") for x in row] for row in text[-2:]] for text in logits.tolist()],
            "greedy": made[0, PROMPT:].tolist(),
        }
    lines = ",\n".join(f'"{name}": {json.dumps(answer)}' for name, answer in answers.items())
    (root / "answers.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "models")
