"""The core of the toolkit: encoder, weights, tokenizer, images, losses, answers, training backends.

Imports nothing of the toolkit outside itself, so each part can be used without the command line.
"""
