"""Times decoding: this on Vulkan and on XLA, and transformers on torch, each in a process of its own, one by one.

    python benchmarks/decode.py [--cases 124m-b1,124m-b32,chat-b1,chat-b32] [--sides vulkan,xla,torch,torch-static]
        [--draws] [--profile]

A case is a config's model with random weights in bf16 and so many texts side by side, each a prompt of 16 tokens and
256 that are drawn (temperature 0.8, top-k 40), none of which ends it. tokens/s counts those of all texts, from the
prompts on, in the best of three runs after a first one, whose compilation is in the start alone. The first token is
that of one text whose prompt comes in, until it can be read (ours: with the chunk that it is part of). `torch` is
transformers' `generate` with its dynamic cache, `torch-static` with a static cache, which it compiles; the chat model
is there GPT-2 in its shape, without the soft cap.

The floor of a step, one token of each text, is the weights, read once, and the keys and values of the texts, on
average, over `--bandwidth`; the gap is how many times as long a step takes. Of Vulkan's steps also how many dispatches
and barriers they have. `--draws` adds the time that drawing a token takes, alone, by what is cut.
"""

import argparse
import collections
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PROMPT, DRAWN = 16, 256
TEMPERATURE, TOP_K = 0.8, 40
SIDES = ("vulkan", "xla", "torch", "torch-static")


class DecodeCase(NamedTuple):
    """A config's model, and how many texts are decoded side by side."""

    config: str
    texts: int
    dtype: str = "bfloat16"

    def load(self) -> Any:
        from program import load_config

        config = load_config(str(HERE.parent / "configs" / self.config))
        config.model.dtype = self.dtype
        return config


CASES = {
    "124m-b1": DecodeCase("gpt2_124m.py", 1),
    "124m-b32": DecodeCase("gpt2_124m.py", 32),
    "chat-b1": DecodeCase("chat.py", 1),
    "chat-b32": DecodeCase("chat.py", 32),
    "chat-f32-b1": DecodeCase("chat.py", 1, "float32"),
    "tiny-b1": DecodeCase("chat_tiny.py", 1, "float32"),
}


def ours(case: DecodeCase, side: str, chunk: int, profile: bool) -> dict[str, Any]:
    """The figures of our decoder on a backend."""
    import jax

    from gpt_jax.backend import enter_backend
    from gpt_jax.inference.decoder import Decoder
    from gpt_jax.inference.generate import generate
    from gpt_jax.inference.sampling import SamplingOptions
    from gpt_jax.model.gpt import GPT, ModelConfig, init_params

    model = GPT(ModelConfig.from_config(case.load().model))
    with contextlib.ExitStack() as stack:
        backend = enter_backend(side, "default", stack)
        params = jax.jit(lambda: init_params(model, 0))()
        decoder = Decoder(model, backend.put(params), backend, slots=case.texts, chunk=chunk)
        prompts = [[(7 * text + place) % 1000 for place in range(PROMPT)] for text in range(case.texts)]
        drawn = min(DRAWN, model.config.block_size - PROMPT)
        options = [SamplingOptions(TEMPERATURE, TOP_K, seed=seed, max_tokens=drawn) for seed in range(case.texts)]

        def run() -> int:
            return sum(map(len, generate(decoder, prompts, options)))

        def first() -> None:
            decoder.insert(0, prompts[0], options[0])
            decoder.decode()
            decoder.release(0)

        found = measure(run, first)
        if side == "vulkan":
            program = decoder._decode[case.texts, 0]
            text = program.lower(decoder._weights, decoder._state).as_text()
            found["size"] = ", ".join(text.split(", ")[:2])
            if profile:
                print_profile(program.profile(decoder._weights, decoder._state), chunk)
        return found


DRAWS = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0),
    "plain": (1.0, 0, 1.0),
    "top-k 40": (TEMPERATURE, TOP_K, 1.0),
    "top-p 0.9": (1.0, 0, 0.9),
    "top-k 40, top-p 0.9": (TEMPERATURE, TOP_K, 0.9),
}


def print_draws(columns: int = 50_257) -> None:
    """Microseconds of the dispatch that draws a token of each of so many rows; logits as spread as a model's."""
    import numpy as np

    import vk_kernels
    from gpt_jax.inference.sampling import SamplingOptions, make_controls
    from vk_kernels import ops

    for rows in (1, 32):
        logits = (3 * np.random.default_rng(0).standard_normal((rows, columns))).astype(np.float32)
        places = np.zeros(rows, np.int32)
        for name, (temperature, top_k, top_p) in DRAWS.items():
            controls = make_controls([SamplingOptions(temperature, top_k, top_p)] * rows)
            draw = vk_kernels.jit(ops.draw_tokens)
            operands = logits, np.zeros((rows, columns), np.int32), places.astype(np.uint32), places, controls
            seconds = min(draw.profile(*operands).seconds for _ in range(10))
            print(f"draw {name:<20} {rows:>3} rows {1e6 * seconds:>8.1f} us", flush=True)


def print_profile(profile: Any, chunk: int) -> None:
    """Device time of a step's dispatches by kernel, each with its number, in the order of what they take."""
    seconds, counts = collections.Counter(), collections.Counter()
    for label, _, taken in profile.rows:
        kernel = label.split("(")[0]
        seconds[kernel] += 1e6 * taken / chunk
        counts[kernel] += 1
    print(
        f"{1e6 * profile.seconds / chunk:8.1f} us a step in {len(profile.rows) / chunk:.1f} dispatches", file=sys.stderr
    )
    for kernel, taken in seconds.most_common(25):
        print(f"{taken:8.1f} us  {counts[kernel] / chunk:6.1f}  {kernel}", file=sys.stderr)


def transformers(case: DecodeCase, is_static: bool) -> dict[str, Any]:
    """The figures of transformers' GPT-2 of the same shape."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = case.load().model
    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.block_size + PROMPT,
        n_embd=model.embed_dim,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    network = GPT2LMHeadModel(config).to("cuda", getattr(torch, case.dtype)).eval()
    tokens = torch.arange(case.texts)[:, None] * 7 + torch.arange(PROMPT)
    drawn = min(DRAWN, model.block_size - PROMPT)
    options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, "pad_token_id": 0}
    if is_static:
        options["cache_implementation"] = "static"

    def run(texts: int = case.texts, count: int = drawn) -> int:
        with torch.inference_mode():
            ids = (tokens[:texts] % 1000).cuda()
            out = network.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        torch.cuda.synchronize()
        return texts * (out.shape[1] - PROMPT)

    return measure(run, lambda: run(1, 1))


def measure(run: Callable[[], int], first: Callable[[], Any]) -> dict[str, Any]:
    """Tokens a second, seconds to a first token, and of the first run."""
    begun = time.perf_counter()
    run()
    start, rates, firsts = time.perf_counter() - begun, [], []
    for _ in range(3):
        begun = time.perf_counter()
        count = run()
        rates.append(count / (time.perf_counter() - begun))
    for _ in range(4):  # the first compiles
        begun = time.perf_counter()
        first()
        firsts.append(time.perf_counter() - begun)
    return {"tokens_per_second": max(rates), "first_token_ms": 1e3 * min(firsts), "start_seconds": start}


def floor_seconds(case: DecodeCase, bandwidth: float) -> float:
    """The least time of one step of all texts, by the bytes that it must read."""
    model = case.load().model
    size = 2 if case.dtype == "bfloat16" else 4
    weights = 12 * model.num_layers * model.embed_dim**2 + model.vocab_size * model.embed_dim
    places = PROMPT + min(DRAWN, model.block_size - PROMPT) / 2
    cache = 2 * model.num_layers * model.embed_dim * places * case.texts
    return size * (weights + cache) / bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="124m-b1,124m-b32,chat-b1,chat-b32")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second that the device reads")
    parser.add_argument("--profile", action="store_true", help="where a chunk's time goes, kernel by kernel")
    parser.add_argument("--draws", action="store_true", help="what drawing a token takes, alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in given.cases.split(","):
        if name not in CASES:
            parser.error(f"there is no case {name!r}: give {', '.join(CASES)}")
    if given.child:
        name, side = given.child.split(":")
        if side == "draws":
            print_draws()
            return
        if side.startswith("torch"):
            found = transformers(CASES[name], side.endswith("static"))
        else:
            found = ours(CASES[name], side, given.chunk, given.profile)
        print(json.dumps(found))
        return
    columns = f"{'tokens/s':>10} {'first token':>12} {'start':>8} {'a step':>11} {'floor':>11} {'gap':>6}"
    print(f"{'case':<12} {'side':<13} {columns}")
    failed = 0
    for name in given.cases.split(","):
        for side in given.sides.split(","):
            command = [sys.executable, __file__, f"--child={name}:{side}", f"--chunk={given.chunk}"]
            command += ["--profile"] if given.profile else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                failed += 1
                print(f"{name:<12} {side:<13} failed")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            floor = 1e6 * floor_seconds(CASES[name], given.bandwidth)
            step = 1e6 * CASES[name].texts / found["tokens_per_second"]
            print(
                f"{name:<12} {side:<13} {found['tokens_per_second']:>10,.0f} {found['first_token_ms']:>9.1f} ms "
                f"{found['start_seconds']:>6.1f} s {step:>8.1f} us {floor:>8.1f} us {step / floor:>6.1f}"
                + (f"  {given.chunk} steps: {found['size']}" if "size" in found else ""),
                flush=True,
            )
    if given.draws:
        subprocess.run([sys.executable, __file__, "--child=:draws"], check=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
