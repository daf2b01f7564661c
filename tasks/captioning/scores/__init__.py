"""Scores of captions: the tokenisation people's published numbers rest on, and the metrics on top of it."""
