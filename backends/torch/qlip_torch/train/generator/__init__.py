"""Training of the generator: the language model over a frozen tokenizer's sub-tokens (SPEC section 4)."""
