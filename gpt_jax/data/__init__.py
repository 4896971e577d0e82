"""The data: corpora, rows, tokens and batches."""
