"""Measures which tile suits each matrix product of a config's train step, and keeps the table for this device.

    python benchmarks/tune_tiles.py [--config configs/chat.py] [--set model.dtype=bfloat16 batch_size=16] [--dry]

Every operation of the step that multiplies matrices is run alone, with each choice of tile and slices of k for one of
its products after the other (an operation's gradient has two, side by side), by turns with what was best so far: a
device that rested has low clocks, and both sides shall have the same. A turn is as many runs as take `--budget` ms; the
search ends early at `--near` times the roofline (FLOPs over `--rate`). What beats the model's choice
by 1 % is then tried in the whole step, since what is faster alone may be slower there, and kept if that is faster
by 0.2 %, in the file that is named, from which it is taken from then on; `--dry` keeps nothing. Last the step is timed
by turns, with the table and without.
"""

import argparse
import ast
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import jax
from program import fresh_leaves, load_config, make_step

import vk_kernels
from vk_kernels.compiler import op_call
from vk_kernels.ops.matmul import gemm, tile_table
from vk_kernels.ops.matmul.tile_table import Choice, Product
from vk_kernels.runtime.dispatch_plan import Plan, kernel_of, record
from vk_kernels.runtime.open_devices import open_device

WORTH, STEP_WORTH = 0.99, 0.998  # of the time before, of an operation and of the step: what a choice must beat


class Operation:
    """An operation of the step that multiplies matrices, on buffers of its own."""

    def __init__(self, planner: Any, arguments: tuple, options: dict[str, Any]) -> None:
        self.planner, self.arguments, self.options = planner, arguments, options
        self.buffers: list[Any] = []

    def plan(self, choices: dict[Product, Choice]) -> Plan:
        with tile_table.answering(choices.get):
            return self.planner(*self.arguments, **self.options)

    def products(self) -> list[Product]:
        """The products that the plan asks for."""
        asked: list[Product] = []
        with tile_table.answering(lambda product: asked.append(product)):  # None: as the model says
            self.planner(*self.arguments, **self.options)
        return asked

    def compile(self, device: Any, choices: Iterable[dict[Product, Choice]]) -> None:
        """Compiles what the plans need, on all cores: a driver takes most of a second for a kernel of a large tile."""
        dispatches = [dispatch for tried in choices for dispatch in self.plan(tried).dispatches]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda dispatch: kernel_of(device, dispatch), dispatches))

    def runner(self, device: Any, choices: dict[Product, Choice]) -> Callable[[int], float]:
        """A function that runs the operation so many times, one after the other, and returns the seconds of one."""
        plan = self.plan(choices)
        inputs, outputs = self.arguments[1:]
        if not self.buffers:
            self.buffers = [device.buffer(array.nbytes) for array in (*inputs, *outputs)]
        buffers = self.buffers + [device.buffer(nbytes) for nbytes in plan.scratch]

        def run(count: int) -> float:
            with device.pooled_recorder() as recorder:
                for _ in range(count):
                    record(recorder, plan, buffers)
                begun = time.perf_counter()
                recorder.submit().wait()
                return (time.perf_counter() - begun) / count

        return run


def seconds_by_turns(runners: Sequence[Callable[[int], float]], budget: float) -> list[float]:
    """The least time of each of the runners, one after the other, five times."""
    count = max(2, min(500, int(1e-3 * budget / max(min(run(2) for run in runners), 1e-6))))
    for run in runners:
        run(count)
    return [min(times) for times in zip(*([run(count) for run in runners] for _ in range(5)), strict=True)]


def operations_of(config: Any, device: Any) -> list[Operation]:
    """The products of the train step, each once."""
    found: dict[Any, Operation] = {}
    look_up = op_call.kernel_op

    def noting(name: str) -> Any:
        op = look_up(name)

        def planner(*arguments: Any, **options: Any) -> Plan:
            operation = Operation(op.planner, arguments, options)
            if operation.products():
                found.setdefault((name, *arguments[1:], *sorted(options.items())), operation)
            return op.planner(*arguments, **options)

        return mock.Mock(planner=planner)

    step, shapes, batch = make_step(config)
    with mock.patch.object(op_call, "kernel_op", noting):
        op_call.make_plan.cache_clear()
        vk_kernels.jit(step, donate_argnums=0).lower(tuple(jax.tree.leaves(shapes)), batch)
    return list(found.values())


def candidates(product: Product, most: int, info: Any) -> list[Choice]:
    """The choices that the model thinks best, best first."""
    tiles = gemm.tiles_for(info, product)
    slices = [splits for splits in (1, 2, 3, 4, 6, 8, 12, 16) if splits == 1 or product.k // splits >= 128]
    speed = gemm._CPU if info.kind == "cpu" else gemm._GPU

    def estimate(choice: tuple[gemm.Tile, int]) -> float:
        return gemm._estimate(*choice, product.m, product.n, product.k, product.batch, product.k_inner, speed)

    ranked = sorted(itertools.product(tiles, slices), key=estimate)
    return [Choice(tile.m, tile.n, tile.k, splits) for tile, splits in ranked[:most]]


def tune(operation: Operation, device: Any, options: argparse.Namespace) -> dict[Product, Choice]:
    """The best choices for an operation's products; none where the model's are as good."""
    products = operation.products()
    tried = {product: candidates(product, options.most, device.info) for product in products}
    operation.compile(device, [{product: choice} for product in products for choice in tried[product]])
    floor = sum(2 * p.batch * p.m * p.n * p.k for p in products) / options.rate
    model = operation.runner(device, {})
    best, chosen = model, {}
    for product, choice in ((one, choice) for one in products for choice in tried[one]):
        other = operation.runner(device, chosen | {product: choice})
        before, after = seconds_by_turns((best, other), options.budget)
        if after < WORTH * before:
            best, chosen = other, chosen | {product: choice}
        if min(before, after) < options.near * floor:
            break
    before, after = (1e6 * seconds for seconds in seconds_by_turns((model, best), 4 * options.budget))
    label = " + ".join(map(str, products))
    what = ", ".join("x".join(map(str, choice[:3])) + f"/{choice.splits}" for choice in chosen.values())
    print(f"{label:<88} model {before:8.1f} us  best {after:8.1f}  floor {1e6 * floor:6.1f}  {what}", flush=True)
    return chosen


class TrainStep:
    """The train step, planned with choices."""

    def __init__(self, config: Any, choices: dict[Product, Choice]) -> None:
        step, shapes, self.batch = make_step(config)
        op_call.make_plan.cache_clear()
        with tile_table.answering(choices.get):
            self.jitted = vk_kernels.jit(step, donate_argnums=0)
            self.state, metrics = self.jitted(vk_kernels.device_put(fresh_leaves(shapes)), self.batch)
        self.loss = float(metrics["loss"])

    def milliseconds(self, count: int = 100) -> float:
        """Time of a step, of so many."""
        self.run(30)
        begun = time.perf_counter()
        self.run(count)
        return 1e3 * (time.perf_counter() - begun) / count

    def run(self, count: int) -> None:
        for _ in range(count):
            self.state, metrics = self.jitted(self.state, self.batch)
        float(metrics["loss"])


def confirm(config: Any, found: list[dict[Product, Choice]]) -> dict[Product, Choice]:
    """The choices found that make the whole step faster, tried an operation at a time."""
    kept: dict[Product, Choice] = {}
    step = TrainStep(config, kept)
    least = min(step.milliseconds() for _ in range(4))
    for choices in found:
        step = TrainStep(config, kept | choices)
        taken = min(step.milliseconds() for _ in range(3))
        print(f"in the step: {least:.3f} -> {taken:.3f} ms with {' + '.join(map(str, choices))}", flush=True)
        if taken < STEP_WORTH * least:
            kept, least = kept | choices, taken
    return kept


def by_turns(config: Any, choices: dict[Product, Choice], turns: int) -> None:
    """Prints the step's time with the choices and without."""
    sides = {"model": TrainStep(config, {}), "table": TrainStep(config, choices)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, step in sides.items():
            times[name].append(step.milliseconds())
    for name, step in sides.items():
        print(f"{name}: {statistics.median(times[name]):.3f} ms a step, first loss {step.loss:.6f}")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/chat.py")
    parser.add_argument("--set", nargs="*", default=["model.dtype=bfloat16"], help="fields of the config")
    parser.add_argument("--budget", type=float, default=2.0, help="ms of a measurement")
    parser.add_argument("--most", type=int, default=8, help="choices of a product")
    parser.add_argument("--rate", type=float, default=4e14, help="FLOPs a second that no product will beat")
    parser.add_argument("--near", type=float, default=1.1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="keep nothing")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # all that runs runs on Vulkan
    config = load_config(options.config)
    for text in options.set:
        name, _, value = text.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
        config.update_from_flattened_dict({name: value})
    device = open_device("")
    begun = time.perf_counter()
    found = []
    for operation in operations_of(config, device):
        found.append(tune(operation, device, options))
        operation.buffers = []
    choices = confirm(config, list(filter(None, found)))
    print(f"{len(choices)} products of another tile than the model's, in {time.perf_counter() - begun:.0f} s")
    by_turns(config, choices, options.turns)
    if not options.dry:
        print(f"kept in {tile_table.keep(device.info, choices)}")


if __name__ == "__main__":
    main()
