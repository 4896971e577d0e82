"""See `vk_kernels.tools.conformance`."""

import sys
import time

from vk_kernels.errors import NoDeviceError
from vk_kernels.tools.arguments import BAD_INPUT, ArgumentParser, run_tool
from vk_kernels.tools.conformance import special
from vk_kernels.tools.conformance.compare import check
from vk_kernels.tools.conformance.suite import cases, names
from vk_kernels.tools.conformance.table import write


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m vk_kernels.tools.conformance", description=__doc__)
    parser.add_argument("--device", help="index, 'gpu', 'cpu' or part of a name; default: VK_KERNELS_DEVICE, or a GPU")
    parser.add_argument("--full", action="store_true", help="every dtype in every shape")
    parser.add_argument("--only", default="", help="primitives, by name, with commas between them")
    parser.add_argument("--table", help="bring the table in this page up to date, and run nothing")
    parser.add_argument(
        "--special", action="store_true", help="with zeros, infinities, NaN, ... as literals and in arrays"
    )
    args = parser.parse_args(argv)
    if args.table:
        try:
            write(args.table)
        except (OSError, ValueError) as error:
            parser.error(f"--table={args.table}: {error}")
        return 0
    known = special.names() if args.special else names()
    wanted = args.only.split(",") if args.only else known
    if unknown := set(wanted) - set(known):
        parser.error(f"no cases of {', '.join(sorted(unknown))}; there are some of {', '.join(known)}")
    if args.special:
        try:
            return special.report(tuple(wanted), args.device)
        except NoDeviceError as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT if args.device else 1
    passed = failed = 0
    for name in wanted:
        start, found = time.perf_counter(), cases(name, args.full)
        try:
            wrong = check(found, args.device)
        except NoDeviceError as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT if args.device else 1
        passed, failed = passed + len(found) - len(wrong), failed + len(wrong)
        spent = time.perf_counter() - start
        print(f"{name:<28} {len(found) - len(wrong):5} passed {len(wrong):5} failed {spent:7.1f} s", flush=True)
        for case, message in wrong.items():
            print(f"    {case}: {message}")
    print(f"{len(wanted)} primitives: {passed} cases passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    run_tool(main)
