"""Lower precision, measured: what each backend's dtypes change against float32.

Of the emoji set's held-out renderings: share of equal bits, of patches with all bits equal, PSNR between
the decoder's pictures of the same codes, and top-1 of 100 seen names on plain renderings.

    python benchmarks/precision.py [--model FOLDER] [--images 200] [--backends torch mlx]
"""

from __future__ import annotations

import argparse

import numpy as np

import qlip_core as qlip
from qlip_core.backends import get_backend, is_installed
from qlip_core.data.emoji_names import CLASS_NAMES_100
from qlip_core.data.emoji_set import EmojiSet
from qlip_core.metrics import psnr


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub id (default: the bundled one)")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--backends", nargs="+", default=["torch", "mlx"])
    options = parser.parse_args()

    reference = qlip.load(options.model, backend="numpy", dtype="float32")
    size = reference.config.image_size
    scenes = EmojiSet(size=size, split="held-out")
    images = [scenes.sample(i)[0] for i in range(options.images)]
    plain = EmojiSet(size=size, split="held-out", plain=True, names=CLASS_NAMES_100)
    shown = [plain.sample(i) for i in range(options.images)]
    pictures, truths = [s[0] for s in shown], [s[1] for s in shown]

    def top1(model: qlip.Model) -> float:
        found = model.classify(pictures, CLASS_NAMES_100).argmax(-1)
        return float(np.mean([CLASS_NAMES_100[i] == t for i, t in zip(found, truths)]))

    tokens = reference.encode(images)
    decoded, bits = reference.decode(tokens), tokens.bits
    print(f"{options.images} held-out renderings, against numpy float32")
    print(
        f"{'backend':8} {'dtype':9} {'bits equal':>11} {'patches equal':>14} {'PSNR':>7} {'top-1':>7}"
    )
    print(f"{'numpy':8} {'float32':9} {'':>11} {'':>14} {'':>7} {100 * top1(reference):6.1f}%")
    for name in filter(is_installed, options.backends):
        for dtype in get_backend(name).dtypes:
            model = qlip.load(options.model, backend=name, dtype=dtype)
            same = model.encode(images).bits == bits
            again = model.decode(tokens)
            differ = (again != decoded).any(axis=(1, 2, 3))
            near = psnr(again[differ], decoded[differ]).mean() if differ.any() else np.inf
            print(
                f"{name:8} {dtype:9} {100 * same.mean():10.4f}% {100 * same.all(-1).mean():13.3f}% "
                f"{near:7.2f} {100 * top1(model):6.1f}%",
                flush=True,
            )


if __name__ == "__main__":
    main()
