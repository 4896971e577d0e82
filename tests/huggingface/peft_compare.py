"""The side of scripts/peft.sh that runs where torch, transformers and peft are, and knows nothing of ours."""

import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

TOLERANCE = 1e-4  # of a logit


def main(work: Path) -> None:
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    load = transformers.AutoModelForCausalLM.from_pretrained
    for folder in sorted(path.parent for path in work.glob("*/ours.npz")):
        ours = np.load(folder / "ours.npz")
        adapted = peft.PeftModel.from_pretrained(load(folder / "base"), folder / "adapter").eval()
        count = sum("lora_A" in name for name, _ in adapted.named_parameters())
        models = {
            ("merged", "exported merged"): load(folder / "merged").eval(),
            ("adapter", f"{count} adapters in peft"): adapted,
        }
        for (kind, what), model in models.items():
            compare(folder.name, what, model, ours["tokens"], ours[kind])
        compare(folder.name, "merged by peft", adapted.merge_and_unload().eval(), ours["tokens"], ours["merged"])
        if np.abs(ours["adapter"] - ours["base"]).max() < 0.1:
            raise SystemExit(f"{folder.name}: the adapters change nothing, so nothing was shown")


def compare(name: str, what: str, model: torch.nn.Module, tokens: np.ndarray, expected: np.ndarray) -> None:
    with torch.no_grad():
        found = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    difference = np.abs(found - expected).max()
    print(f"{name}, {what}: logits differ by {difference:.1e}")
    if difference > TOLERANCE:
        raise SystemExit(f"{name}, {what}: that is above {TOLERANCE}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
