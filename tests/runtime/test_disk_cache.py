"""The cache of kernels keeps to its bound: what was not used for the longest goes, and nothing that is not its own."""

import os
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from vk_kernels.errors import SettingError
from vk_kernels.runtime import disk_cache

MB = 10**6


def fill(root: Path, sizes: list[int]) -> list[Path]:
    """Files of these sizes, in two folders by turns, each last used a day before the one behind it."""
    files = [disk_cache.file_of(root / "ab"[i % 2], str(i)) for i in range(len(sizes))]
    for i, (file, size) in enumerate(zip(files, sizes, strict=True)):
        disk_cache.replace(file, bytes(size))
        used = time.time() - 86_400 * (len(files) - i)
        os.utime(file, (used, used))
    return files


def there(files: list[Path]) -> list[bool]:
    return [file.exists() for file in files]


def test_what_was_not_used_for_the_longest_goes_and_nothing_of_others(tmp_path):
    files = fill(tmp_path, [300_000] * 4)
    others = [tmp_path / "tiles" / "10de-2330.json", tmp_path / "a" / "model.bin", tmp_path / files[0].name]
    others.append(tmp_path / "a" / "deeper" / files[0].name)
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(bytes(MB))
        os.utime(other, (0, 0))
    disk_cache.remove_unused(tmp_path, 0)
    disk_cache.remove_unused(tmp_path, 1_200_000)
    assert there(files) == [True] * 4
    disk_cache.remove_unused(tmp_path, 1_199_999)
    assert there(files) == [False, True, True, True]
    disk_cache.remove_unused(tmp_path, 800_000)  # 700,000 are left at most
    assert there(files) == [False, False, True, True]
    assert there(others) == [True] * len(others)


def test_what_is_read_counts_as_used(tmp_path):
    files = fill(tmp_path, [300_000] * 4)
    disk_cache.load(files[0])  # damaged or not
    disk_cache.remove_unused(tmp_path, 700_000)
    assert there(files) == [True, False, False, True]


def test_who_writes_keeps_to_the_bound_whoever_writes_beside(tmp_path, monkeypatch):
    monkeypatch.setenv("VK_KERNELS_CACHE_MB", "1")
    parts = np.random.default_rng(0).bytes(200 * 20_000)
    data = [parts[i : i + 20_000] for i in range(0, len(parts), 20_000)]
    most = []

    def write(mine: list[bytes]) -> None:
        for each in mine:
            file = disk_cache.file_of(tmp_path / "a", each.hex())
            disk_cache.save(file, each)
            assert disk_cache.load(file) in (each, b"")
            most.append(sum(status.st_size for _, status in disk_cache._files(tmp_path)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=write, args=(data[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(most) == len(data)
    assert 0.7 * MB < max(most) < 2 * MB  # of 4 MB: about every third file looks, in whatever order they come


@pytest.mark.parametrize("text", ["1 GB", "-1", "many", "1e3", "\u0661"])
def test_a_bound_that_is_none_is_a_line(text, monkeypatch):
    monkeypatch.setenv("VK_KERNELS_CACHE_MB", text)
    with pytest.raises(SettingError, match="VK_KERNELS_CACHE_MB is a whole number of megabytes, 0 for any number, not"):
        disk_cache.most_bytes()


@pytest.mark.parametrize(("text", "most"), [("", 1000 * MB), ("0", 0), ("50", 50 * MB)])
def test_the_bound_is_that_of_the_variable(text, most, monkeypatch):
    monkeypatch.setenv("VK_KERNELS_CACHE_MB", text)
    assert disk_cache.most_bytes() == most
