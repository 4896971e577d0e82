"""A token cache of a small source, for the tests of what prepares and reads one."""

from pathlib import Path

from ml_collections import ConfigDict

from gpt_jax.data import token_cache


def config(cache, **changes):
    fields = {"source": "default", "validation_fraction": 0.05, "tokenizer": "", "cache_dir": str(cache)}
    return ConfigDict(fields | changes)


def prepare(chats, log=lambda line: None, vocab_size=300, **changes):
    fields = {"source": str(chats), "validation_fraction": 0.2} | changes
    return token_cache.prepare(config(Path(chats).parent / "cache", **fields), vocab_size, log)


def folder_of(prepared):
    """The folder of the cache that holds the tokens of a corpus of one source."""
    [train] = prepared.train
    return Path(train.ids.filename).parent
