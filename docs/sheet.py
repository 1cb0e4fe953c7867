"""The sheet of drawn pictures in the README: a row for each prompt, a column for each of the seeds 0 to 15.

python docs/sheet.py [-o docs/images/generated.png]

Every picture is the one that `qlip generate PROMPT --seed SEED` draws; none is chosen by hand.
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image

import qlip_core as qlip

PROMPTS = (
    "a cat",
    "a red apple on a blue background",
    "a guitar on a white background",
    "a house",
    "a fish on a pink background",
)
SEEDS = range(16)
GAP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", default="docs/images/generated.png")
    parser.add_argument("--model", default=None)
    parser.add_argument("--generator", default=None)
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()

    model = qlip.load(args.model, backend=args.backend, generator=args.generator)
    columns = [model.generate(PROMPTS, seed=seed) for seed in SEEDS]
    side = model.config.image_size
    step = side + GAP
    shape = len(PROMPTS) * step - GAP, len(SEEDS) * step - GAP, 3
    sheet = np.full(shape, 255, np.uint8)
    for column, pictures in enumerate(columns):
        for row, picture in enumerate(pictures):
            y, x = row * step, column * step
            sheet[y : y + side, x : x + side] = picture
    Image.fromarray(sheet).save(args.output)


if __name__ == "__main__":
    main()
