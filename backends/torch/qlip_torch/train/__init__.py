"""Training on PyTorch: QLIP in its two stages, and in `generator` the language model over its sub-tokens."""
