"""Instruments: what a model, or a quantization of it, is worth.

protocol    which tokens of a text are scored
estimates   means, percentiles and their errors
perplexity  how well a model predicts a text, and how far it is from another one
"""
