"""Text to image: whether pictures fit their prompts (CLIPScore, prompt accuracy) and look real (gFID).

Pictures are drawn, decoded and scored batch by batch, as the 8-bit pictures that would be saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlip_core.data.samples import Tally
from qlip_core.errors import DataError
from qlip_core.evaluation.clip_score import DEFINITION, QlipTowers, Towers, clip_scores
from qlip_core.evaluation.examples import Examples, batches, check_some
from qlip_core.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from qlip_core.evaluation.grid import draw_sheet
from qlip_core.evaluation.prompts import PromptSet
from qlip_core.evaluation.protocol import ReferenceHash, Result, make_protocol, text_hash
from qlip_core.evaluation.reconstruction import Features
from qlip_core.evaluation.zero_shot import TEMPLATES, rank_of
from qlip_core.generator.checkpoint import GeneratorCheckpoint
from qlip_core.generator.load import require_generator
from qlip_core.generator.sampling import Sampling
from qlip_core.loading import DEFAULT_BATCH, Progress
from qlip_core.model import Model

TOP1, TOP5 = "prompt accuracy, top-1", "prompt accuracy, top-5"
SELF_GRADED = "the model's own towers, and a model that grades itself flatters itself"
_COLUMNS = 10  # of a sheet


@dataclass(frozen=True, eq=False)
class RealPictures:
    """What gFID compares drawn pictures with: the features of real ones, and the network that gave them."""

    name: str
    inception: Features
    gaussian: Gaussian
    count: int
    reference: str
    """SHA-256 of the pictures as preprocessing leaves them."""
    failed: Mapping[str, Any]

    @property
    def protocol(self) -> str:
        return f"{self.inception.protocol}; real: {self.count} pictures, SHA-256 {self.reference}"


def real_pictures(
    model: Model,
    examples: Examples,
    inception: Features,
    *,
    batch_size: int = DEFAULT_BATCH,
    progress: Progress | None = None,
) -> RealPictures:
    """The features of a set, at the size of the pictures that `model` draws.

    Raises DataError if fewer than 2 pictures can be read.
    """
    broken, reference, statistics = Tally(), ReferenceHash(), FeatureStatistics()
    for chunk, pixels in batches(model, examples, batch_size, broken):
        images = model.preprocessing.to_images(pixels)
        reference.add(images)
        statistics.add(inception(images))
        if progress is not None:
            progress(len(chunk))
    check_some(statistics.count, examples, broken)
    if statistics.count < 2:
        raise DataError(f"{examples.name}: gFID needs 2 real pictures or more, got 1")
    return RealPictures(
        examples.name,
        inception,
        statistics.gaussian(),
        statistics.count,
        reference.hexdigest(),
        broken.to_dict(),
    )


def evaluate_generation(
    model: Model,
    prompts: PromptSet,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    n: int = 1,
    towers: Towers | None = None,
    real: RealPictures | None = None,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 8,
    shown: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Draw n pictures of each prompt and measure them.

    CLIPScore is the mean over pictures of max(cosine with the prompt, 0), by `towers` (None: the model's
    own, which flatter it). Prompt accuracy is the share of pictures for which the model's own zero-shot
    classifier picks the thing that the prompt names from `prompts.classes` (top-1), or has it among the five
    nearest (top-5); ties count against it, and a class's text embedding is the mean over `templates`. gFID
    is the Fréchet distance of the drawn pictures' features to those of `real`. What cannot be measured is
    None, and the result's "left_out" says why.

    `sampling` None is the generator's own. The first `shown` pictures make the result's `grid`. Raises
    GenerationError for a model without a generator or a setting out of range, DataError for weights
    that give no finite figures.
    """
    generator = require_generator(model.checkpoint, model.generator)
    sampling = sampling or generator.config.sampling
    sampling.check(generator.config.visual_vocab_size)
    total = n * len(prompts.prompts)
    if real is not None and total < 2:
        raise DataError(f"{prompts.name}: gFID needs 2 drawn pictures or more, got {total}")
    own = QlipTowers(model)
    judge = own if towers is None or towers.protocol == own.protocol else towers
    classes = model.embed_labels(prompts.classes, templates) if prompts.classes else None
    measured = _Measured(own, judge, prompts, n, real, classes, shown)
    texts = [prompt.text for prompt in prompts.prompts]
    for _, tokens in model.generate_batches(texts, sampling, seed=seed, n=n, batch_size=batch_size):
        measured.add(model.decode(tokens, batch_size=batch_size))
        if progress is not None:
            progress(len(tokens))
    things = [part for prompt in prompts.prompts for part in (prompt.text, prompt.name)]
    settings: dict[str, Any] = {"seed": seed, "pictures_of_each_prompt": n}
    if prompts.names_things:
        settings |= {
            "classes": len(prompts.classes),
            "classes_sha256": text_hash(prompts.classes),
            "templates": list(templates),
        }
    protocol = make_protocol(
        model,
        "text to image",
        prompts.name,
        total,
        text_hash(things),
        uses_text=True,
        metrics=measured.metrics(),
        settings=settings,
        drawn_by=drawn_by(model, generator, sampling),
    )
    failed = real.failed if real is not None else prompts.failed
    grid = measured.sheet(max(1, 128 // model.config.image_size))
    return Result(protocol, measured.scores(), measured.details(), failed, grid)


class _Measured:
    """Collects the scores of pictures, added in the order of the prompts, n for each."""

    def __init__(
        self,
        own: QlipTowers,
        judge: Towers,
        prompts: PromptSet,
        n: int,
        real: RealPictures | None,
        classes: np.ndarray | None,
        shown: int,
    ) -> None:
        self._own, self._judge, self._real = own, judge, real
        self._prompts, self._n, self._shown = prompts, n, shown
        self._number = {name: i for i, name in enumerate(prompts.classes)}
        self._classes = classes
        self._cosines: list[float] = []
        self._ranks: list[int] = []
        self._found: list[str] = []
        self._statistics = FeatureStatistics()
        self._kept: list[np.ndarray] = []

    def add(self, pictures: np.ndarray) -> None:
        """The next pictures, uint8 [b, S, S, 3]."""
        start = len(self._cosines)
        asked = [self._prompts.prompts[i // self._n] for i in range(start, start + len(pictures))]
        seen = self._judge.embed_images(pictures)
        texts = self._judge.embed_texts([prompt.text for prompt in asked])
        self._cosines += clip_scores(seen, texts).tolist()
        if self._classes is not None:
            if self._judge is not self._own:
                seen = self._own.embed_images(pictures)
            near = seen @ self._classes.T  # [b, C]
            right = np.array([self._number[prompt.name] for prompt in asked])
            self._ranks += rank_of(near, right).tolist()
            self._found += [self._prompts.classes[i] for i in near.argmax(1)]
        if self._real is not None:
            self._statistics.add(self._real.inception(pictures))
        self._kept += list(pictures[: max(0, self._shown - start)])

    def scores(self) -> dict[str, float | None]:
        out: dict[str, float | None] = {"CLIPScore": float(np.mean(self._cosines))}
        if self._classes is not None:
            ranks = np.array(self._ranks)
            out |= {TOP1: float((ranks < 1).mean()), TOP5: float((ranks < 5).mean())}
            out["chance"] = 1 / len(self._classes)
        else:
            out |= {TOP1: None, TOP5: None}
        if self._real is not None:
            out["gFID"] = frechet_distance(self._statistics.gaussian(), self._real.gaussian)
        else:
            out["gFID"] = None
        return out

    def metrics(self) -> dict[str, str]:
        """What measured each available score."""
        out = {"CLIPScore": f"{DEFINITION}; {self._judge.protocol}"}
        if self._classes is not None:
            out["prompt accuracy"] = f"classification by {self._own.protocol}"
        if self._real is not None:
            out["gFID"] = self._real.protocol
        return out

    def details(self) -> dict[str, Any]:
        judge = SELF_GRADED if self._judge is self._own else self._judge.name
        judged = {"CLIPScore": f"{judge} ({self._judge.protocol})"}
        left_out = {}
        if self._classes is not None:
            judged["prompt accuracy"] = (
                f"the model's own classifier, among {len(self._classes)} names"
            )
        else:
            left_out["prompt accuracy"] = "the prompts do not say what thing they name"
        if self._real is not None:
            judged["gFID"] = f"{self._real.inception.protocol}; real pictures: {self._real.name}"
        else:
            left_out["gFID"] = "no weights of FID's Inception-V3 were given"
        return {"judged_by": judged, "left_out": left_out, "pictures": self._each()}

    def _each(self) -> list[dict[str, Any]]:
        out = []
        for i, cosine in enumerate(self._cosines):
            prompt = self._prompts.prompts[i // self._n]
            each: dict[str, Any] = {"prompt": prompt.text, "CLIPScore": cosine}
            if self._classes is not None:
                each |= {"name": prompt.name, "found": self._found[i], "rank": self._ranks[i] + 1}
            out.append(each)
        return out

    def sheet(self, scale: int) -> np.ndarray | None:
        if not self._kept:
            return None
        captions = [self._prompts.prompts[i // self._n].text for i in range(len(self._kept))]
        columns = self._n if 1 < self._n <= 2 * _COLUMNS else _COLUMNS
        return draw_sheet(self._prompts.name, self._kept, captions, columns, scale)


# -- what draws --------------------------------------------------------------------------------


def drawn_by(model: Model, generator: GeneratorCheckpoint, sampling: Sampling) -> dict[str, Any]:
    """What draws, in JSON types: a protocol's `drawn_by`."""
    config = generator.config
    return {
        "generator": generator.fingerprint,
        "generator_name": str(generator.folder),
        "tokenizer": model.fingerprint,
        "conditioner": config.t5_model if config.conditioner == "t5" else config.conditioner,
        **sampling.to_dict(),
    }
