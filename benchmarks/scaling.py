"""Times the train step of configs/chat.py over batch sizes and block sizes, and plots what is found.

    python benchmarks/scaling.py [--dtypes bf16,f32] [--rivals xla] [--plot benchmarks/scaling.png]

Each point is a process of its own: see train_step.py. Batches of 1 to 64 at the config's block of 256 tokens, and
blocks of 128 to 2,048 tokens at its batch of 16.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from train_step import measure

BATCH, BLOCK = 16, 256
SWEEPS = {"batch": [1, 2, 4, 8, 16, 32, 64], "block": [128, 256, 512, 1024, 2048]}


def name_of(dtype: str, sweep: str, size: int) -> str:
    batch, block = (size, BLOCK) if sweep == "batch" else (BATCH, size)
    return f"chat-{dtype}-b{batch}-t{block}"


def plot(found: dict[tuple[str, str], dict[str, float]], path: Path) -> None:
    """found: ms a step by the case's name, by (side, dtype)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SWEEPS), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (sweep, sizes) in zip(axes, SWEEPS.items(), strict=True):
        for (side, dtype), by_name in found.items():
            points = [(size, by_name[name]) for size in sizes if (name := name_of(dtype, sweep, size)) in by_name]
            if points:
                axis.loglog(*zip(*points, strict=True), marker="o", label=f"{side}, {dtype}")
        axis.set_xticks(sizes, labels=map(str, sizes))
        axis.minorticks_off()
        axis.set_xlabel(f"batch ({BLOCK} tokens each)" if sweep == "batch" else f"block, tokens (batch {BATCH})")
        axis.grid(True, alpha=0.3)
    axes[0].set_yticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
    axes[0].set_ylabel("ms a step")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bf16,f32")
    parser.add_argument("--rivals", default="", help="xla, torch: beside vulkan")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("scaling.png"))
    options = parser.parse_args()
    found: dict[tuple[str, str], dict[str, float]] = {}
    row = "{:<24} {:<7} {:>9} {:>12} {:>10}"
    print(row.format("case", "side", "ms", "tokens/s", "memory MB"))
    failed = False
    with tempfile.TemporaryDirectory() as caches:
        for side in ["vulkan", *filter(None, options.rivals.split(","))]:
            for dtype in options.dtypes.split(","):
                by_name = found.setdefault((side, dtype), {})
                names = [name_of(dtype, sweep, size) for sweep, sizes in SWEEPS.items() for size in sizes]
                for name in dict.fromkeys(names):
                    one = measure(name, side, options.steps, False, caches)
                    if "error" in one:
                        print(f"{name:<24} {side:<7} failed: {one['error']}", flush=True)
                        failed = True
                        continue
                    by_name[name] = one["ms"]
                    numbers = (
                        f"{one['ms']:.3f}",
                        f"{one['tokens'] / one['ms'] * 1e3:,.0f}",
                        f"{one['memory'] / 1e6:,.0f}",
                    )
                    print(row.format(name, side, *numbers), flush=True)
    plot(found, options.plot)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
