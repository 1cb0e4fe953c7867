"""Errors a user can cause and fix. Each message is one line: what, where, what to do about it."""


class QlipError(ValueError):
    """Base of every error that qlip raises for wrong input. The command line prints it and exits 2."""


class ConfigError(QlipError):
    """A configuration that is unreadable, has an unknown key or describes an impossible model."""


class CheckpointError(QlipError):
    """Weights that are missing, damaged, of the wrong shape, or not safetensors."""


class ImageError(QlipError):
    """A file or array that is not an image this package can read."""


class TextError(QlipError):
    """Text or token ids that the text tower does not accept."""


class TokenFileError(QlipError):
    """A token file that is damaged, of another version, or made by another tokenizer."""


class BackendError(QlipError):
    """A backend, device or dtype that is not available."""


class DataError(QlipError):
    """A training or evaluation set that cannot be read as asked."""


class RecipeError(QlipError):
    """A training recipe with an unknown key or an impossible value."""


class GenerationError(QlipError):
    """A setting of generation that is out of range, or a generator that does not fit the model."""
