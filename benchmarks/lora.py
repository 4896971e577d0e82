"""Times the train step of adapters (LoRA) beside that of all parameters, by turns, and counts what each needs.

    python benchmarks/lora.py [--cases 124m-plain-b4,124m-plain-b16] [--rank 8] [--sides vulkan,xla] [--steps 100]
    python benchmarks/lora.py --plan [--cases tiny-f32]

Each side of a case runs in a process of its own, as in benchmarks/train_step.py, first all parameters, then adapters,
and again in that order, --rounds times: ms is the least median of the rounds. Memory is the most that was in use on the
device. With --plan nothing runs: the step is planned for a Vulkan device, of which any will do (VK_KERNELS_DEVICE=cpu),
and the bytes of its state and of its arena are counted, its dispatches, and among them products. A device whose buffers
are too small for the embedding takes a smaller vocabulary, --vocab_size.
"""

import argparse
import os
import sys
import tempfile
from typing import Any

from train_step import case_of, measure

ROW = "{:<16} {:<7} {:<8} {:>9} {:>7} {:>10} {:>10} {:>6}"
PLAN_ROW = "{:<16} {:<8} {:>11} {:>10} {:>10} {:>7} {:>9} {:>10}"


def compare(name: str, side: str, rank: int, steps: int, rounds: int) -> bool:
    """Prints a line for all parameters and one for adapters; whether both ran."""
    kinds = {"all": name, f"rank {rank}": f"{name}-lora{rank}"}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as caches:
        for _ in range(rounds):
            for kind, case in kinds.items():
                found[kind].append(measure(case, side, steps, False, caches))
    errors = {kind: each["error"] for kind, some in found.items() for each in some if "error" in each}
    for kind, error in errors.items():
        print(f"{name:<16} {side:<7} {kind:<8} failed: {error}", flush=True)
    if errors:
        return False
    best = {kind: min(some, key=lambda each: each["ms"]) for kind, some in found.items()}
    whole = best["all"]
    for kind, each in best.items():
        memory = f"{each['memory'] / 1e6:,.0f} MB" if each.get("memory") else "-"
        arena = f"{each['arena'] / 1e6:,.0f} MB" if "arena" in each else "-"
        ms, ratio = f"{each['ms']:.3f}", f"{each['ms'] / whole['ms']:.2f}"
        print(ROW.format(name, side, kind, ms, ratio, memory, arena, each.get("dispatches", "-")), flush=True)
    return True


def plan(name: str, vocab_size: int | None) -> None:
    """Prints what the planned step of a case needs."""
    import jax
    from program import make_step

    import vk_kernels

    config = case_of(name).load()
    if vocab_size is not None:
        config.model.vocab_size = vocab_size
    step, state, batch = make_step(config)
    lowered = vk_kernels.jit(step, donate_argnums=0).lower(tuple(jax.tree.leaves(state)), batch)
    cost, labels = lowered.cost(), [command.label for command in lowered.program.commands]
    products = sum(label.startswith("matmul") and not label.startswith(NO_PRODUCTS) for label in labels)
    moments = state_bytes(state.opt_state)
    numbers = (f"{nbytes / 1e6:,.1f} MB" for nbytes in (state_bytes(state.params), moments, cost.arena_bytes))
    kind = f"rank {config.lora.rank}" if config.lora.rank else "all"
    row = PLAN_ROW.format(name, kind, *numbers, cost.dispatches, products, f"{cost.flops / 1e9:,.1f} G")
    print(row, flush=True)


NO_PRODUCTS = ("matmul_finish", "matmul_column", "matmul_epilogue")  # what else a product's plan has


def state_bytes(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="124m-plain-b4,124m-plain-b16", help="of benchmarks/train_step.py")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sides", default="vulkan,xla")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="plan, and run nothing")
    parser.add_argument("--vocab_size", type=int, help="with --plan: of the model, instead of the config's")
    options = parser.parse_args()
    names = options.cases.split(",")
    if options.plan:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        print(PLAN_ROW.format("case", "trained", "parameters", "moments", "arena", "disp.", "products", "FLOPs"))
        for name in names:
            plan(name, options.vocab_size)
            plan(f"{name.rpartition('-lora')[0] or name}-lora{options.rank}", options.vocab_size)
        return 0
    print(ROW.format("case", "side", "trained", "ms", "ratio", "memory", "arena", "disp."))
    done = [
        compare(name, side, options.rank, options.steps, options.rounds)
        for name in names
        for side in options.sides.split(",")
    ]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
