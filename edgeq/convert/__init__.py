"""From one container to the other.

source      a model under GGUF's names, from a GGUF file or a Hugging Face folder
stream      its tensors in other formats
"""
