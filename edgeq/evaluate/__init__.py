"""Instruments: what a model, or a quantization of it, is worth.

protocol    which tokens of a text are scored
estimates   means, percentiles and their errors
perplexity  how well a model predicts a text, and how far it is from another one
distance    how far tensors are from those of another model
health      what is wrong with a tensor's own numbers
audit       a verdict on a file
difference  what differs between two models
compare     models beside the one they were made from: what quantizing costs
laboratory  runs the commands that compare takes its numbers from
page, chart what compare found, for a browser
"""
