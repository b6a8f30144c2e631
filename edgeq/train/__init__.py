"""Training: gradients of the very networks that run.

tape        operations of a transformer, each with its gradient beside it
backend     the operations that `edgeq.arch` calls, recorded on the tape
"""
