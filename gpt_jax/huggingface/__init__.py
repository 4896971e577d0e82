"""GPT-2 as Hugging Face's transformers keeps it: read as a donor, and written."""
