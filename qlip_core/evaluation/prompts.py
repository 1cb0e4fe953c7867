"""Prompts to draw and measure, each with the thing it names, if known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlip_core.data.samples import Bad, Tally
from qlip_core.errors import DataError
from qlip_core.evaluation.examples import Examples
from qlip_core.files import read_lines


@dataclass(frozen=True)
class Prompt:
    """A text to draw, and the thing that a classifier should find in the picture (empty: unknown)."""

    text: str
    name: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and the names among which a classifier chooses (default: all that the prompts name).

    Raises DataError for a set without prompts, a blank prompt, or prompts of which only some name a thing;
    and, if they do name things, for fewer than 2 names to choose among, a repeated one, or a thing that is
    not among them.
    """

    name: str
    prompts: tuple[Prompt, ...]
    classes: tuple[str, ...] = ()
    failed: Mapping[str, Any] = field(default_factory=dict)
    """What could not be read, as from `Tally.to_dict`."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError(f"{self.name}: no prompt in it")
        for number, prompt in enumerate(self.prompts, 1):
            if not prompt.text.strip():
                raise DataError(f"{self.name}: prompt {number} is blank")
            if bool(prompt.name) != self.names_things:
                other = "the first names none" if prompt.name else "the first names one"
                raise DataError(
                    f"{self.name}: prompt {number} ({prompt.text!r}) names {'a' if prompt.name else 'no'} "
                    f"thing, {other}: name the thing of each prompt, or of none"
                )
        if self.names_things and not self.classes:
            object.__setattr__(self, "classes", tuple(dict.fromkeys(p.name for p in self.prompts)))
        if self.names_things or self.classes:
            self._check_classes()

    def _check_classes(self) -> None:
        if not self.names_things:
            raise DataError(
                f"{self.name}: names to choose among are given, but its prompts name nothing: lines of "
                "prompt<TAB>name do"
            )
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise DataError(
                f"{self.name}: {len(self.classes)} names to choose among; need 2 or more, all different"
            )
        among = set(self.classes)
        for prompt in self.prompts:
            if prompt.name not in among:
                raise DataError(
                    f"{self.name}: {prompt.name!r} is not among the {len(among)} names to choose among"
                )

    @property
    def names_things(self) -> bool:
        """Whether the prompts say what they name."""
        return bool(self.prompts[0].name)

    def first(self, count: int | None) -> PromptSet:
        """The first `count` prompts (None: all), with the same names to choose among."""
        if count is None or count >= len(self.prompts):
            return self
        if count < 1:
            raise DataError(f"limit (={count}) must be at least 1")
        name = f"{self.name}, the first {count}"
        return replace(self, name=name, prompts=self.prompts[:count])


def read_prompts(path: str | Path, classes: Sequence[str] = ()) -> PromptSet:
    """Prompts from a file of lines "prompt", or "prompt<TAB>name of the thing in it".

    Blank lines are ignored. Raises DataError for a file that cannot be read, or as `PromptSet` does.
    """
    prompts = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        text, *names = (part.strip() for part in line.split("\t"))
        if not text or len(names) > 1 or names == [""]:
            raise DataError(
                f"{path}, line {number}: expected prompt or prompt<TAB>name, got {line!r}"
            )
        prompts.append(Prompt(text, *names))
    return PromptSet(str(path), tuple(prompts), tuple(classes))


def captions_of(examples: Examples) -> PromptSet:
    """The captions of a set of pictures as prompts. Raises DataError for a picture without one."""
    prompts, broken = [], Tally()
    for example in examples:
        if isinstance(example, Bad):
            broken.add(example)
        elif not example.caption:
            raise DataError(
                f"{examples.name}: {example.key} has no caption; give prompts in a file (--prompts)"
            )
        else:
            prompts.append(Prompt(example.caption))
    return PromptSet(f"captions of {examples.name}", tuple(prompts), failed=broken.to_dict())
