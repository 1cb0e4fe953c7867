"""`qlip doctor`: what is installed, on which devices, and whether it computes correctly."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip_cli.options import Json
from qlip_cli.terminal import print_facts, print_json, print_line, print_table, progress

if TYPE_CHECKING:
    import numpy as np

    from qlip_core.backends import Backend, Network

PACKAGES = ("qlip", "numpy", "pillow", "tokenizers", "safetensors", "huggingface_hub")
# What every backend guarantees in float32: equal bits where |u| exceeds the first, the rest within the second.
U_MARGIN, TOLERANCE = 1e-5, 1e-4
_IMAGES = 4


def doctor(
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", "-b", metavar="NAME", show_default=False, help="Look at this one only."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check what is installed, and test every backend and device.

    The test runs a small model with random weights and compares bits, pixels and embeddings with
    the reference in double precision. The exit status is 1 if an installed backend fails.
    """
    from qlip_core import backend_names, choose_backend
    from qlip_core.errors import BackendError

    names = backend_names()
    if backend not in (None, "auto", *names):
        raise BackendError(f'no backend "{backend}"; there are: {", ".join(names)}')
    chosen = choose_backend()
    asked = names if backend is None else [chosen if backend == "auto" else backend]
    with progress("testing", len(asked)) as advance:
        reports = []
        for name in asked:
            reports.append(examine(name))
            advance(1)
    healthy = all(test["ok"] for r in reports for test in r["tests"]) and not any(
        r["error"] for r in reports
    )
    document = {
        "ok": healthy,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "bundled_model": bundled_model(),
        "auto": chosen,
        "backends": reports,
    }
    if json:
        print_json(document)
    else:
        print_report(document)
    raise typer.Exit(0 if healthy else 1)


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def bundled_model() -> str | None:
    from qlip_core.hub import BUNDLED

    return str(BUNDLED) if Path(BUNDLED).is_dir() else None


# -- backends ----------------------------------------------------------------------------------


def examine(name: str) -> dict[str, Any]:
    """One backend: version, devices, dtypes and a test on every device, or why there are none."""
    from qlip_core import get_backend
    from qlip_core.backends import is_installed
    from qlip_core.errors import BackendError

    report: dict[str, Any] = {
        "name": name,
        "installed": is_installed(name),
        "error": None,
        "version": None,
        "devices": [],
        "dtypes": [],
        "tests": [],
    }
    if not report["installed"]:
        return report | {"hint": f"pip install 'qlip[{name}]'"}
    try:
        backend = get_backend(name)
        report |= {
            "version": backend.version(),
            "devices": backend.devices(),
            "dtypes": list(backend.dtypes),
        }
        report["tests"] = [self_test(backend, device) for device in report["devices"]]
    except BackendError as error:
        report["error"] = str(error)
    except Exception as error:  # finding whatever a broken framework raises is the doctor's job
        report["error"] = f"{type(error).__name__}: {error}"
    return report


def self_test(backend: Backend, device: str) -> dict[str, Any]:
    """The tiny preset with random weights against the reference in float64, on random pixels.

    Bits must be equal where |u| > U_MARGIN; decoded pixels and unit embeddings of images and texts
    must agree within TOLERANCE.
    """
    import numpy as np

    from qlip_core import PRESETS
    from qlip_core.architecture import ArrayWeights, init_weights
    from qlip_core.bsq import bits_to_codes, quantize
    from qlip_core.reference import ReferenceNetwork

    config = PRESETS["tiny"]
    weights = ArrayWeights(config, init_weights(config))
    generator = np.random.default_rng(0)
    shape = (_IMAGES, 3, config.image_size, config.image_size)
    pixels = generator.standard_normal(shape, np.float32)
    ids = text_ids(generator)
    result: dict[str, Any] = {"device": device, "ok": False, "error": None}
    try:
        ours: Network = backend.network(config, weights, device=device, dtype="float32")
        theirs = ReferenceNetwork(config, weights, "float64")
        u, u_true = ours.latents(pixels), theirs.latents(pixels)
        bits = quantize(u_true)
        codes = bits_to_codes(bits)
        flipped = ours.encode(pixels) != bits
        result |= {
            "bits": int(u.size),
            "bits_different": int(flipped.sum()),
            "bits_wrong": int((flipped & (np.abs(u_true) > U_MARGIN)).sum()),
            "u_difference": largest(u, u_true),
            "pixel_difference": largest(ours.decode(codes), theirs.decode(codes)),
            "image_difference": largest(
                unit(ours.embed_images(pixels)), unit(theirs.embed_images(pixels))
            ),
            "text_difference": largest(unit(ours.embed_texts(ids)), unit(theirs.embed_texts(ids))),
        }
    except Exception as error:  # as above: any failure of a device is a finding
        return result | {"error": f"{type(error).__name__}: {error}"}
    differences = [result[key] for key in result if key.endswith("_difference")]
    # Written so that NaN fails the comparison.
    good = all(difference <= TOLERANCE for difference in differences)
    return result | {"ok": good and result["bits_wrong"] == 0}


def text_ids(generator: np.random.Generator) -> np.ndarray:
    """Token ids int64 [B, T] of texts of different lengths."""
    import numpy as np

    from qlip_core import PRESETS

    text = PRESETS["tiny"].text_config
    ids = np.full((_IMAGES, text.max_position_embeddings), text.pad_token_id)
    for length, row in zip((3, 7, 20, text.max_position_embeddings), ids):
        row[: length - 1] = generator.integers(0, text.vocab_size - 2, length - 1)
        row[0], row[length - 1] = text.bos_token_id, text.eos_token_id
    return ids.astype(np.int64)


def unit(x: np.ndarray) -> np.ndarray:
    import numpy as np

    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def largest(a: np.ndarray, b: np.ndarray) -> float:
    import numpy as np

    difference = float(np.abs(a - b).max())
    return difference if np.isfinite(difference) else sys.float_info.max


# -- printed -----------------------------------------------------------------------------------


def print_report(document: dict[str, Any]) -> None:
    packages = ", ".join(f"{n} {v}" for n, v in document["packages"].items() if v and n != "qlip")
    missing = document["packages"]["huggingface_hub"] is None
    hub = "; no huggingface_hub: hub ids need pip install 'qlip[hub]'" if missing else ""
    print_facts(
        [
            ("qlip", document["packages"]["qlip"] or "not installed as a package"),
            ("python", f"{document['python']} on {document['platform']}"),
            ("packages", packages + hub),
            ("own model", document["bundled_model"] or "this build has none: use --model"),
            ("auto picks", document["auto"]),
        ]
    )
    print_line("")
    rows = [row for report in document["backends"] for row in report_rows(report)]
    print_table(rows, ("backend", "version", "device", "self-test", "max |du|", "pixels"))
    for report in document["backends"]:
        if report["dtypes"]:
            print_line(f"{report['name']} computes in {', '.join(report['dtypes'])}")
        for test in report["tests"]:
            if test["error"]:
                print_line(f"{report['name']} on {test['device']}: {test['error']}")
        if report["error"]:
            print_line(f"{report['name']}: {report['error']}")


def report_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    if not report["installed"]:
        return [(report["name"], "absent", "", report["hint"], "", "")]
    tests = report["tests"]
    if not tests:
        return [(report["name"], report["version"] or "?", "", "FAILED", "", "")]
    return [
        (
            report["name"] if i == 0 else "",
            report["version"] if i == 0 else "",
            test["device"],
            test_text(test),
            f"{test['u_difference']:.0e}" if not test["error"] else "",
            f"{test['pixel_difference']:.0e}" if not test["error"] else "",
        )
        for i, test in enumerate(tests)
    ]


def test_text(test: dict[str, Any]) -> str:
    if test["error"]:
        return "FAILED"
    equal = test["bits"] - test["bits_different"]
    verdict = "ok" if test["ok"] else "FAILED"
    return f"{verdict}, {equal:,} of {test['bits']:,} bits"
