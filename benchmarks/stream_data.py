"""Peak memory and speed of preparing a corpus, over its size, and of drawing shuffled batches from it.

    python benchmarks/stream_data.py --megabytes 64,256,1024 --limit 400

Makes a synthetic source of each size, and has a process of its own read it, train a tokenizer, write the token cache
and draw batches. `--limit` is what that process may allocate, in MB (RLIMIT_DATA: memory of its own, which neither the
page cache nor a memory map of a file is part of), so that a source is larger than the memory there is, as on a smaller
machine. Flat memory is the same peak in all rows.
"""

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WORDS, SENTENCES = 500, 2_000
VOCABULARY = 16_000
BATCHES = 200


def write_source(path: Path, megabytes: int) -> None:
    """Writes documents of some 4,000 characters, each with a number of its own.

    Words are long and few, so that each is a token in the end: text of a language is tokenised at half the rate.
    """
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(40, 80))) for _ in range(WORDS)]
    ranks = [1 / (rank + 10) for rank in range(WORDS)]  # as words of a language are spread
    sentences = [" ".join(rng.choices(words, ranks, k=rng.randint(5, 30))) + "." for _ in range(SENTENCES)]
    packed = path.suffix == ".gz"
    with gzip.open(path, "wt", compresslevel=1) if packed else path.open("w") as file:
        number = written = 0
        while written < megabytes * 1e6:
            text = f"Number {number}.\n" + "\n".join(rng.choices(sentences, k=4))
            number += 1
            if ".jsonl" in path.name:
                written += file.write(json.dumps({"text": text}) + "\n")
            else:
                written += file.write(f"{text}\n<|end_of_text|>\n")


def memory(field: str) -> float:
    """MB of a field of /proc/self/status."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


class Peak(threading.Thread):
    """The largest anonymous memory that was seen, every 50 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.megabytes = 0.0

    def run(self) -> None:
        while True:
            self.megabytes = max(self.megabytes, memory("RssAnon"))
            time.sleep(0.05)


def measure(source: Path, cache: Path, limit: int, sample: int) -> None:
    """Prepares the source in this process, and prints what it took."""
    from ml_collections import ConfigDict

    from gpt_jax.data import batches, token_cache

    token_cache.TOKENIZER_CHARACTERS = sample
    before, peak = memory("RssAnon"), Peak()
    threading.stack_size(2**20)  # a thread's 8 MB are reserved, not used, and would count
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit * 2**20, limit * 2**20))
    peak.start()
    fields = {"source": str(source), "validation_fraction": 0.05, "tokenizer": "", "cache_dir": str(cache)}
    begun, used = time.perf_counter(), time.process_time()
    prepared = token_cache.prepare(ConfigDict(fields), VOCABULARY, lambda line: print(f"  {line}", file=sys.stderr))
    seconds, processor = time.perf_counter() - begun, time.process_time() - used
    preparing = peak.megabytes
    dataset = batches.windows(prepared.train, block_size=256, batch_size=16, seed=0)
    begun = time.perf_counter()
    for number in range(BATCHES):
        dataset[number]
    drawing = 1e3 * (time.perf_counter() - begun) / BATCHES
    size = sum(prepared.stats[split]["bytes"] for split in prepared.stats) / 1e6
    print(
        f"| {size:,.0f} | {prepared.stats['train']['tokens'] / 1e6:,.1f} | {before:.0f} | {preparing:.0f} | "
        f"{peak.megabytes:.0f} | {memory('VmHWM'):.0f} | {seconds:,.0f} | {size / processor:.2f} | {drawing:.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", default="64,256,1024")
    parser.add_argument("--format", choices=("txt", "jsonl", "txt.gz", "jsonl.gz"), default="txt")
    parser.add_argument("--limit", type=int, default=0, help="MB that the process may allocate; 0: any")
    parser.add_argument("--sample", type=int, default=500_000_000, help="characters that the tokenizer is trained on")
    parser.add_argument("--folder", help="where source and cache are written, and removed")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), Path(options.measure[1]), options.limit, options.sample)
        return
    print(f"limit {options.limit or 'none'} MB, .{options.format}, tokenizer of {options.sample:,} characters at most")
    print(
        "| source MB | training tokens, M | MB of its own at the start | peak, preparing | peak, with batches | "
        "peak with mapped files | s | MB/s of processor time | ms a batch |"
    )
    print("| --- " * 9 + "|", flush=True)
    for megabytes in map(int, options.megabytes.split(",")):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            source = Path(folder, f"source.{options.format}")
            write_source(source, megabytes)
            command = [sys.executable, __file__, "--measure", str(source), str(Path(folder, "cache"))]
            command += ["--limit", str(options.limit), "--sample", str(options.sample)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
