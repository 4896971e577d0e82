"""Names that mean something wherever data are named; no imports, so that all may ask."""

TOKENIZER_FILE = "tokenizer.json"  # of a run, of prepared data and of a model of transformers
HUGGING_FACE = "hf:"  # before the name of a dataset or a model at Hugging Face


def is_hugging_face(name: object) -> bool:
    """Whether a data source, or the donor that `config.init_from` names, is one of Hugging Face."""
    return isinstance(name, str) and name.startswith(HUGGING_FACE)
