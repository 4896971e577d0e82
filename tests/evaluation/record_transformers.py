"""Records what transformers gives for a model of tests/huggingface, to compare with: needs torch and transformers.

    python tests/evaluation/record_transformers.py

Writes transformers.json beside this file: the data, and the sums and choices that follow from torch's probabilities.
"""

import json
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer

HERE = Path(__file__).parent
MODEL = HERE.parent / "huggingface" / "models" / "old"
BLOCK, STRIDE = 16, 5
DIALOGUES = [
    ("the moon and the sea?", "the sun and the moon, <|endoftext|> and naïve the sea"),
    ("sun", "the sea and the sun"),
]
CHOICES = [
    ("the moon and", ["the sun", "the sea", "a moon"], 1),
    ("the sun and the moon and the sea and the sun and the moon", ["the", "sea and the moon"], 0),
]
LAST_WORDS = ["the moon and the sun", "the sea and\nthe sea"]


def main() -> None:
    model = GPT2LMHeadModel.from_pretrained(MODEL, torch_dtype=torch.float32).eval()
    tokenizer = GPT2Tokenizer.from_pretrained(MODEL)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    @torch.no_grad()
    def log_probabilities(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    stream, counted = [end], [False]
    for question, answer in DIALOGUES:
        for ids, counts in ((encode(question), True), (encode("\n\n"), False), (encode(answer), True), ([end], True)):
            stream += ids
            counted += [counts] * len(ids)
    sums = {}
    for stride in (BLOCK, STRIDE):
        nats, done, first = [], 1, 0
        while done < len(stream):
            last = min(first + BLOCK, len(stream) - 1)
            found = log_probabilities(stream[first:last])
            for place in range(done, last + 1):
                nats.append(-found[place - 1 - first, stream[place]].item())
            done, first = last + 1, first + stride
        targets = list(zip(stream[1:], counted[1:], nats, strict=True))
        sums[stride] = {
            "tokens": sum(counts for _, counts, _ in targets),
            "nats": sum(loss for _, counts, loss in targets if counts),
            "text_nats": sum(loss for token, counts, loss in targets if counts and token != end),
        }

    def follow(context: str, continuation: str) -> tuple[float, bool]:
        ids, more = encode(context), encode(continuation)
        whole = [*ids, *more][-BLOCK - 1 :]
        found, wanted = log_probabilities(whole[:-1])[-len(more) :], torch.tensor(more)
        return found.gather(1, wanted[:, None]).sum().item(), bool((found.argmax(-1) == wanted).all())

    choices = []
    for context, texts, answer in CHOICES:
        likelihoods = [follow(context, f" {text}")[0] for text in texts]
        by_length = [value / len(text) for value, text in zip(likelihoods, texts, strict=True)]
        choices.append([max(range(len(texts)), key=x.__getitem__) == answer for x in (likelihoods, by_length)])
    words = []
    for text in LAST_WORDS:
        cut = len(text.rstrip()) - len(text.split()[-1])
        words.append(follow(text[:cut].rstrip(), text[len(text[:cut].rstrip()) :]))
    recorded = {
        "dialogues": [{"prompt": question, "completion": answer} for question, answer in DIALOGUES],
        "bytes": sum(len(text.encode()) for dialogue in DIALOGUES for text in dialogue),
        "sums": sums,
        "choices": [{"context": c, "choices": texts, "answer": answer} for c, texts, answer in CHOICES],
        "acc": sum(plain for plain, _ in choices) / len(choices),
        "acc_norm": sum(normed for _, normed in choices) / len(choices),
        "last_words": [{"text": text} for text in LAST_WORDS],
        "last_word_acc": sum(hit for _, hit in words) / len(words),
        "last_word_nats": sum(-value for value, _ in words) / len(words),
    }
    (HERE / "transformers.json").write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
