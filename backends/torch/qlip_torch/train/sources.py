"""What a recipe's `location` names: the emoji set drawn on the fly, or a set on disk or behind a URL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args
from urllib.parse import parse_qsl

from qlip_core.data.emoji_names import CLASS_NAMES_100, seen_glyphs
from qlip_core.data.emoji_set import EmojiSet, Split, Wording
from qlip_core.data.samples import Limits
from qlip_core.data.shards import open_source
from qlip_core.errors import DataError
from qlip_torch.train.feeds import IndexedSource, Rendered
from qlip_torch.train.lanes import StreamSource

# Sets of names that training may be limited to, each under a keyword.
_NAMES: dict[str, Callable[[], tuple[str, ...]]] = {
    "classes": lambda: CLASS_NAMES_100,
    "common": lambda: tuple(glyph.name for glyph in seen_glyphs() if glyph.common),
}


class EmojiSource:
    """The emoji set, endless: no two rows of a run are the same picture."""

    count: int | None = None

    def __init__(self, location: str, options: dict[str, Any]):
        self.location, self._options = location, options
        self._emoji = EmojiSet(**options)

    def __reduce__(self) -> tuple[Any, ...]:
        # An open font cannot be pickled, so a spawned worker opens its own.
        return EmojiSource, (self.location, self._options)

    @classmethod
    def from_location(cls, location: str, image_size: int, seed: int) -> EmojiSource:
        """From "emoji" or "emoji?key=value&…"; size and seed default to the model's and the run's."""
        options: dict[str, Any] = {"size": image_size, "seed": seed}
        readers = {
            "split": str,
            "seed": int,
            "size": int,
            "common_share": float,
            "plain": {"true": True, "false": False}.__getitem__,
            "wording": {word: word for word in get_args(Wording)}.__getitem__,
            "names": lambda word: _NAMES[word](),
        }
        _, _, query = location.partition("?")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        except ValueError:
            raise DataError(f"{location}: write options as emoji?key=value&key=value") from None
        for key, value in pairs:
            if key not in readers:
                raise DataError(f"{location}: unknown option {key!r}; known: {', '.join(readers)}")
            try:
                options[key] = readers[key](value)
            except (ValueError, KeyError):
                raise DataError(f"{location}: {value!r} is not a value for {key}") from None
        if options.get("split", "train") not in get_args(Split):
            raise DataError(f"{location}: split must be one of {', '.join(get_args(Split))}")
        return cls(location, options)

    def read(self, index: int) -> Rendered:
        scene = self._emoji.scene(index)
        return Rendered(f"emoji-{index}", self._emoji.render(scene), self._emoji.caption(scene))


def is_emoji(location: str) -> bool:
    """Whether the pictures are drawn rather than read."""
    return location == "emoji" or location.startswith("emoji?")


def open_training_source(
    location: str, image_size: int, seed: int, limits: Limits
) -> IndexedSource | StreamSource:
    """The source that `location` names. Raises DataError if there is none."""
    if is_emoji(location):
        return EmojiSource.from_location(location, image_size, seed)
    return open_source(location, limits)
