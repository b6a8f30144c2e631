"""From one container to the other.

source        a model under GGUF's names, from a GGUF file or a Hugging Face folder
stream        its tensors in other formats
exact         integers with scales of their own in GGUF's types, the same numbers
huggingface   a model as a folder, plain or in a quantized layout
"""
