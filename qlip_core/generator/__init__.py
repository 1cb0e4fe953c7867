"""Text to image over visual tokens: the language model as data, its numpy reference, sampling.

SPEC sections 4 and 5. `generate` is what `Model.generate` and the command line call.
"""
