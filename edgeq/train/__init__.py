"""Training: gradients of the very networks that run.

tape       operations of a transformer, each with its gradient beside it
backend    the operations that `edgeq.arch` calls, recorded on the tape
optim      from gradients to steps
data       examples, and which of their tokens are learned
loop       steps, and checkpoints from which a run goes on
scratch    models from nothing: vocabulary, first weights, stretches of a text
qat        weights that learn as they will be stored
lora       pairs of thin matrices that learn beside frozen ones
adapter    such pairs as files, of PEFT and of llama.cpp
picture    the losses as a PNG
run        training an adapter, from names of files to files
"""
