"""The tokenizer of a folder of transformers: read as it is, given the chat's markers, and written for AutoTokenizer."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gpt_jax.data.dialogue import ASSISTANT, END, MARKERS, USER
from gpt_jax.data.names import TOKENIZER_FILE
from gpt_jax.errors import UserError
from gpt_jax.storage.files import unreadable
from gpt_jax.storage.json_file import read_object

TOKENIZER_CONFIG = "tokenizer_config.json"
_VOCABULARY, _MERGES, _ADDED = "vocab.json", "merges.txt", "added_tokens.json"  # of GPT-2's first folders
_SPECIAL = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"  # where transformers 5 saves what was in tokenizer_config.json
_GPT2_END = "<|endoftext|>"

# Spells a conversation as `encode_dialogues` and `encode_prompt` do: markers, stripped texts, the system's text before
# the first user turn, and the end of text after an answer that is not to be gone on with.
CHAT_TEMPLATE = f"""\
{{%- set chat = namespace(system='', before='') -%}}
{{%- for message in messages -%}}
{{%- set text = message['content'] | trim -%}}
{{%- if message['role'] in ['system', 'developer'] -%}}
{{%- if chat.before -%}}{{{{ raise_exception('a system message can only come first') }}}}{{%- endif -%}}
{{%- if text -%}}{{%- set chat.system = (chat.system + '\\n\\n' if chat.system else '') + text -%}}{{%- endif -%}}
{{%- else -%}}
{{%- if message['role'] not in ['user', 'assistant'] -%}}
{{{{- raise_exception('a message is of the user, the assistant or the system, found ' + message['role']) }}}}
{{%- endif -%}}
{{%- if message['role'] == chat.before -%}}
{{{{- raise_exception('user and assistant must speak by turns') }}}}
{{%- endif -%}}
{{%- if not text -%}}{{{{ raise_exception('a message is empty') }}}}{{%- endif -%}}
{{%- if message['role'] == 'user' -%}}
{{{{- '{USER}' + (chat.system + '\\n\\n' if chat.system else '') + text }}}}
{{%- else -%}}
{{{{- ('{USER}' + chat.system if chat.system else '') + '{ASSISTANT}' + text }}}}
{{%- endif -%}}
{{%- set chat.system = '' -%}}
{{%- set chat.before = message['role'] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{ '{ASSISTANT}' }}}}
{{%- elif chat.before == 'assistant' -%}}{{{{ '{END}' }}}}
{{%- endif -%}}
"""


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, None if it has none; vocab.json and merges.txt are read as GPT-2's.

    Raises:
      UserError: it is damaged.
    """
    file = folder / TOKENIZER_FILE
    if not file.exists():
        return _read_first_kind(folder) if (folder / _VOCABULARY).exists() else None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file} cannot be read as a tokenizer: {' '.join(str(error).split())}") from None


def _read_first_kind(folder: Path) -> Tokenizer:
    """GPT-2's byte-level BPE, from a vocabulary and its merges."""
    if not (folder / _MERGES).exists():
        raise UserError(f"{folder} has {_VOCABULARY} and no {_MERGES}, which belongs to it: put it back")
    try:
        model = models.BPE.from_file(str(folder / _VOCABULARY), str(folder / _MERGES))
    except Exception as error:  # as above
        cause = " ".join(str(error).split())
        raise UserError(f"{folder}: {_VOCABULARY} and {_MERGES} cannot be read as a tokenizer: {cause}") from None
    tokenizer = Tokenizer(model)
    prefix = bool(_read(folder / TOKENIZER_CONFIG).get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(_GPT2_END) is not None:
        tokenizer.add_special_tokens([AddedToken(_GPT2_END, special=True, normalized=False)])
    added = sorted(_read(folder / _ADDED).items(), key=lambda item: str(item[1]).zfill(20))
    for text, number in added:
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        if (found := tokenizer.token_to_id(text)) != number:
            raise UserError(f"{folder / _ADDED}: {text!r} is {number!r}, and the next free number is {found}")
    return tokenizer


def end_of_text(folder: Path, tokenizer: Tokenizer | None, config: dict[str, Any]) -> str | None:
    """The token by which a model says that its text ends, as its tokenizer's files or its config.json tell."""
    if tokenizer is None:
        return None
    for file in (TOKENIZER_CONFIG, _SPECIAL):
        token = _read(folder / file).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and tokenizer.token_to_id(text) is not None:
            return text
    number = config.get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return tokenizer.id_to_token(number) if isinstance(number, int) and 0 <= number < 2**32 else None


def _read(file: Path) -> dict[str, Any]:
    """The object of a JSON file; an empty one if there is no file."""
    return read_object(file, known=None) if file.exists() else {}


def with_all_markers(tokenizer: Tokenizer) -> tuple[Tokenizer, tuple[str, ...]]:
    """A copy that has the chat's three markers, and those that it lacked, which come after its other tokens."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    missing = missing_markers(tokenizer)
    tokenizer.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in missing])
    return tokenizer, missing


def missing_markers(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The chat's markers that a tokenizer has not."""
    return tuple(marker for marker in MARKERS if tokenizer.token_to_id(marker) is None)


def tokenizer_config(block_size: int) -> dict[str, Any]:
    """The tokenizer_config.json of a chat model.

    The class is named, since AutoTokenizer would else give a GPT-2 the pre-tokenizer of OpenAI's.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def has_other_chat_template(folder: Path) -> bool:
    """Whether a folder says how a chat is written, and otherwise than here."""
    if (folder / _TEMPLATE).exists():
        try:
            return (folder / _TEMPLATE).read_bytes() != CHAT_TEMPLATE.encode()
        except OSError as error:
            raise unreadable(folder / _TEMPLATE, error) from error
    return _read(folder / TOKENIZER_CONFIG).get("chat_template") not in (None, CHAT_TEMPLATE)
