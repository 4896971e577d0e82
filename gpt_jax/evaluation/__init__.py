"""Figures of a model on data: likelihood of text, last words, answers to choose from."""
