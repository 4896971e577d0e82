"""Byte-level BPE with Hugging Face `tokenizers`, in which any text round-trips; tokens of dialogues, and who says each.

The markers are the first three ids of a tokenizer trained here: 0 `<|user|>`, 1 `<|assistant|>`,
2 `<|end_of_text|>`. Text never encodes to them, even where it spells one out: only `encode_dialogues` and
`encode_prompt` put markers down, so no text can forge a turn.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gpt_jax.data.dialogue import ASSISTANT, END, MARKERS, TEXT, USER, Context, Dialogue, Part, Turn
from gpt_jax.errors import UserError
from gpt_jax.log import Log
from gpt_jax.storage.files import replacing

SAID, UNCOUNTED = 1, 2  # of a token: the assistant says it; it is never a target
SMALLEST_VOCABULARY = 256 + len(MARKERS)  # every byte, and the markers


# A letter run, a run of signs, a run of blanks: every word that the pre-tokenizer makes lies inside one of these.
_LONGEST_WORD = 1000  # characters: the time to train grows with the square of a word's length
_LONG_WORD = re.compile(
    rf"[^\W_]{{{_LONGEST_WORD + 1},}}|(?:[^\w\s]|_){{{_LONGEST_WORD + 1},}}|\s{{{_LONGEST_WORD + 1},}}"
)
_SIGN_OF_LIFE = 30  # seconds between two lines while a tokenizer is trained


def train_tokenizer(texts: Iterable[str], vocab_size: int, log: Log = logging.info) -> Tokenizer:
    """Trains a BPE on `texts`, deterministically. Words of more than 1,000 characters are trained on in pieces.

    The result has fewer than `vocab_size` ids where the texts hold too few pairs to merge that occur twice.

    Raises:
      UserError: `vocab_size` has no room for the 256 bytes and the markers.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size is {vocab_size}: a byte-level tokenizer needs {SMALLEST_VOCABULARY} or more "
            f"(256 bytes and {len(MARKERS)} markers)"
        )
    tokenizer = Tokenizer(models.BPE())
    # Its regex parts `<|`, `user` and `|>`, so no merge can ever spell a marker.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(MARKERS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _in_thread(lambda: tokenizer.train_from_iterator(_in_pieces(texts, log), trainer), log)
    tokenizer.encode_special_tokens = True  # a marker spelled in a text is text
    return tokenizer


def _in_pieces(texts: Iterable[str], log: Log) -> Iterator[str]:
    """The texts, those with a very long word cut inside it."""
    told = False
    for text in texts:
        start = 0
        for word in _LONG_WORD.finditer(text):
            if not told:
                told = True
                log(
                    f"data: a word of {len(word[0]):,} characters ({word[0][:20]}...): the tokenizer is trained on "
                    f"pieces of words longer than {_LONGEST_WORD:,}"
                )
            for cut in range(word.start() + _LONGEST_WORD, word.end(), _LONGEST_WORD):
                yield text[start:cut]
                start = cut
        yield text[start:]


def _in_thread(train: Callable[[], None], log: Log) -> None:
    """Waits for `train` in a way that a signal can end, which Rust's code alone would not; says that it goes on."""
    # A daemon: Python does not wait for it when it ends early.
    done: Future[None] = Future()

    def run() -> None:
        try:
            done.set_result(train())
        except BaseException as error:
            done.set_exception(error)

    begun = time.monotonic()
    threading.Thread(target=run, name="tokenizer", daemon=True).start()
    while not wait([done], timeout=_SIGN_OF_LIFE).done:  # not result(): a source may raise a TimeoutError of its own
        log(f"data: training the tokenizer for {time.monotonic() - begun:.0f} s")
    done.result()


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes tokenizer.json; a reader never sees half of it. Raises OSError."""
    with replacing(Path(path)) as file:
        file.write(tokenizer.to_str(pretty=True))


def load(path: str | Path | Tokenizer) -> Tokenizer:
    """Reads a tokenizer.json, one of ours or any other that is byte-level and has the markers, or takes it.

    Raises:
      UserError: it is missing or damaged, lacks a marker, or changes or forges text.
    """
    if isinstance(path, Tokenizer):
        return _made_ready(path, "of the donor")
    if not Path(path).is_file():
        raise UserError(f"tokenizer {path} does not exist: give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"tokenizer {path} cannot be read, it is damaged: {' '.join(str(error).split())}") from None
    return _made_ready(tokenizer, str(path))


def _made_ready(tokenizer: Tokenizer, path: str) -> Tokenizer:
    """A tokenizer that takes text for text alone. Raises as `load`."""
    for marker in MARKERS:
        if tokenizer.token_to_id(marker) is None:
            raise UserError(f"tokenizer {path} has no token {marker}: add the three markers as special tokens")
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    sample = "Naïve 真\t\r\n  x" + "".join(MARKERS)
    ids = encode(tokenizer, sample)
    if (back := tokenizer.decode(ids, skip_special_tokens=False)) != sample:
        raise UserError(
            f"tokenizer {path} does not give text back as it was: {sample!a} comes back as {back!a}; it must be "
            "byte-level, without a normalizer and without add_prefix_space"
        )
    if set(ids) & set(marker_ids(tokenizer)):
        raise UserError(f"tokenizer {path} makes a marker out of text, so that text could forge a turn")
    return tokenizer


def marker_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids of `<|user|>`, `<|assistant|>` and `<|end_of_text|>`; (0, 1, 2) if it was trained here."""
    user, assistant, end = map(tokenizer.token_to_id, (USER, ASSISTANT, END))
    return user, assistant, end


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of plain text; never a marker's."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids, markers spelled out."""
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def vocabulary_bytes(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """The bytes of each token; none for those of `size` ids that there is no token for.

    Raises:
      UserError: a token is not of GPT-2's byte alphabet.
    """
    # GPT-2's alphabet: a byte that prints is its own character, the others follow from 256 on.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    byte_of = {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}

    def spelled(token: str | None) -> bytes:
        if token is None or token in added:
            return (token or "").encode()
        try:
            return bytes(byte_of[character] for character in token)
        except KeyError:
            raise UserError(f"the tokenizer's token {token!r} is not byte-level, as all must be") from None

    return [spelled(tokenizer.id_to_token(i)) for i in range(size)]


def encode_prompt(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """The ids of turns that end with a user turn, and the `<|assistant|>` that asks for the answer."""
    user, assistant, _ = marker_ids(tokenizer)
    ids = []
    for role, text in turns:
        ids += [user if role == "user" else assistant, *encode(tokenizer, text)]
    return [*ids, assistant]


def encode_dialogues(tokenizer: Tokenizer, dialogues: Sequence[Dialogue]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encodes dialogues in one parallel batch.

    Returns for each dialogue or document of n tokens, as `corpus.render` spells it:
      ids (n,) uint32, and assistant (n,) uint8: SAID for the tokens that the assistant says, which are those of
      its text and the marker that follows it, the next `<|user|>` or the `<|end_of_text|>`, by which it says
      that it has finished; UNCOUNTED for those of a turn that is context, and of its marker; else 0.
    """
    user, assistant, end = marker_ids(tokenizer)
    texts = [turn.text for dialogue in dialogues for turn in dialogue.turns]
    encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    result = []
    for dialogue in dialogues:
        ids: list[int] = []
        said: list[int] = []
        before = 0  # what the turn before was
        for turn in dialogue.turns:
            spoken = next(encodings).ids
            if turn.role == TEXT:
                ids, said = spoken, [0] * len(spoken)
                break
            ids += [user if turn.role == "user" else assistant, *spoken]
            kind = UNCOUNTED if isinstance(turn, Context) else SAID if turn.role == "assistant" else 0
            said += [before, *[kind] * len(spoken)]
            before = kind
        if not isinstance(dialogue, Part):
            ids, said = [*ids, end], [*said, before]
        result.append((np.array(ids, np.uint32), np.array(said, np.uint8)))
    return result
