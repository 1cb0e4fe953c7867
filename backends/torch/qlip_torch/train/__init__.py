"""Two-stage training of QLIP on PyTorch: objectives, optimizers, and what measures them."""
