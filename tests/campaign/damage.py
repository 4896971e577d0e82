"""Damage to every file of a run folder: each command works, or says in one line what is wrong; no record is cut."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from runs import REPORT, SAMPLE, STEPS, Tiny, keys
from zygote import call

Outcome = tuple[str, str]


def _cut(file: Path, _: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _zero(file: Path, _: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _delete(file: Path, _: random.Random) -> None:
    file.unlink()


def _folder(file: Path, _: random.Random) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = {"cut": _cut, "zeros": _zero, "a bit flipped": _flip, "deleted": _delete, "a folder": _folder}


def damage(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    """`count` of all pairs of a file and a damage, drawn without repetition."""
    files = sorted(path.relative_to(straight) for path in straight.rglob("*") if path.is_file())
    files += sorted(Path(path) for path in ("checkpoints",))
    cases = [(file, name) for file in files for name in DAMAGES if file.name != "checkpoints" or name == "deleted"]
    for file, name in rng.sample(cases, min(count, len(cases))):
        workdir = folder / "damaged"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(straight, workdir)
        target = workdir / file
        shutil.rmtree(target) if target.is_dir() else DAMAGES[name](target, rng)
        left = keys(workdir)
        problem = ""
        for ended in (
            call(REPORT, workdir),
            call(SAMPLE, f"--workdir={workdir}", "--prompt=moon?", "--max_tokens=2", "--seed=1"),
            tiny.train(workdir, f"--config.num_steps={STEPS + 2}"),
        ):
            problem = problem or ended.problem(0, 1, 2)
        if not problem and not left <= keys(workdir):
            problem = f"lost in silence: {sorted(map(str, left - keys(workdir)))[:3]}"
        yield f"damage: {name}", problem and f"{file}: {problem}"
