"""Evaluation: figures against hand-worked cases, and results that refuse to stand beside others."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from configurations import CONFIGURATIONS, random_weights
from PIL import Image

import qlip_core as qlip
from qlip_core.data.samples import Bad, Tally
from qlip_core.data.tars import write_tar
from qlip_core.errors import CheckpointError, DataError, QlipError
from qlip_core.evaluation import (
    Example,
    ExampleList,
    Result,
    StoredExamples,
    compare,
    emoji,
    evaluate_linear_probe,
    evaluate_reconstruction,
    evaluate_retrieval,
    evaluate_zero_shot,
)
from qlip_core.evaluation.bits import CodeUsage
from qlip_core.evaluation.examples import Part, batches, read_classes
from qlip_core.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from qlip_core.evaluation.logistic import fit
from qlip_core.evaluation.protocol import ReferenceHash, recipe_hash, weights_fingerprint
from qlip_core.evaluation.retrieval import recall
from qlip_core.evaluation.zero_shot import rank_of
from qlip_core.metrics import psnr, ssim
from qlip_core.tensorfile import write_tensors

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (20, 50, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The tiny preset with random weights, its text tower fitted to the tokenizer of the tests."""
    tiny = qlip.PRESETS["tiny"]
    ids = {"vocab_size": 520, "bos_token_id": 518, "eos_token_id": 519, "pad_token_id": 519}
    config = replace(tiny, text_config=replace(tiny.text_config, **ids))
    out = tmp_path_factory.mktemp("evaluated") / "tiny"
    weights = random_weights(config, seed=1)
    return qlip.save_checkpoint(out, config, weights, tokenizer_from=tokenizer_folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> qlip.Model:
    return qlip.load(folder, backend="numpy")


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(count)]


def coloured(count: int, seed: int = 0) -> ExampleList:
    """Noisy pictures of a colour each, labelled and captioned by it."""
    generator = np.random.default_rng(seed)
    out = []
    for i in range(count):
        name = list(COLOURS)[i % 3]
        noise = generator.integers(-25, 26, (64, 64, 3))
        image = (np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)
        out.append(Example(str(i), image, f"a {name} thing", name))
    return ExampleList("coloured", out)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


# -- Fréchet distance --------------------------------------------------------------------------


def test_statistics_are_numpys() -> None:
    features = np.random.default_rng(0).standard_normal((50, 7)) + 1e4
    statistics = FeatureStatistics()
    for start in range(0, 50, 13):
        statistics.add(features[start : start + 13])
    gaussian = statistics.gaussian()
    np.testing.assert_allclose(gaussian.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features, rowvar=False), rtol=1e-9)
    with pytest.raises(QlipError, match="at least 2"):
        FeatureStatistics().gaussian()
    with pytest.raises(QlipError, match="NaN"):
        statistics.add(np.full((1, 7), np.nan))


def test_frechet_distance_by_hand() -> None:
    a = Gaussian(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = Gaussian(np.array([0.0, 4.0]), np.diag([1.0, 16.0]))
    # |m|^2 = 1 + 4; diagonal covariances: (2 - 1)^2 + (3 - 4)^2.
    assert frechet_distance(a, b) == pytest.approx(7.0, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)
    # Turning both the same way changes nothing, and covariances no longer commute with the axes.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    c = Gaussian(turn @ b.mean, turn @ b.covariance @ turn.T)
    d = Gaussian(turn @ a.mean, turn @ a.covariance @ turn.T)
    assert frechet_distance(d, c) == pytest.approx(7.0, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    generator = np.random.default_rng(3)
    x, y = (generator.standard_normal((9, 6)) for _ in range(2))
    a, b = (Gaussian(np.zeros(6), m.T @ m) for m in (x, y))
    cross = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real).sum()
    expected = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    # Fewer images than features: singular covariances, and still no imaginary part.
    x, y = x[:3], y[:3]
    a, b = (Gaussian(np.zeros(6), m.T @ m) for m in (x, y))
    nuclear = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = np.trace(a.covariance) + np.trace(b.covariance) - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


# -- ranks, recalls, codes ---------------------------------------------------------------------


def test_ranks_count_ties_against() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 5.0, 5.0], [2.0, 2.0, 2.0]])
    assert rank_of(scores, np.array([1, 1, 0])).tolist() == [1, 1, 2]
    with pytest.raises(DataError, match="NaN"):
        rank_of(np.full((1, 2), np.nan), np.array([0]))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_recall_in_chunks_is_brute_force(chunk: int) -> None:
    generator = np.random.default_rng(1)
    queries, candidates = generator.standard_normal((7, 4)), generator.standard_normal((11, 4))
    query_group = generator.integers(0, 4, 7)
    candidate_group = np.concatenate([np.arange(4), generator.integers(0, 4, 7)])
    found = recall(queries, candidates, query_group, candidate_group, (1, 2, 5), chunk)
    for k, share in found.items():
        hits = []
        for q, group in zip(queries, query_group):
            best = np.argsort(-(candidates @ q))[:k]
            hits.append(group in candidate_group[best])
        assert share == np.mean(hits)


def test_recall_by_hand() -> None:
    unit = np.eye(3)
    groups = np.arange(3)
    assert recall(unit, unit, groups, groups, (1,)) == {1: 1.0}
    # A model that says the same of everything finds nothing at 1, and all among 3.
    same = np.ones((3, 2))
    assert recall(same, same, groups, groups, (1, 2, 3)) == {1: 0.0, 2: 0.0, 3: 1.0}
    # Equal captions are one group: each of them is a hit.
    assert recall(same, same, np.zeros(3), np.zeros(3), (1,)) == {1: 1.0}
    with pytest.raises(DataError, match="NaN"):
        recall(unit * np.nan, unit, groups, groups)


def test_code_usage_by_hand() -> None:
    usage = CodeUsage(4, 2)
    bits = np.array([[[0, 0, 1, 1], [0, 1, 1, 1]], [[0, 0, 1, 1], [0, 1, 0, 1]]], np.uint8)
    for image in bits:
        usage.add(qlip.VisualTokens.from_bits(image[None], (1, 2)))
    assert usage.tokens == 4
    np.testing.assert_array_equal(usage.ones(), [0, 0.5, 0.75, 1])
    three = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    np.testing.assert_allclose(usage.bit_entropy(), [0, 1, three, 0], atol=1e-12)
    # First group: 00 twice, 01 twice; second: 11 three times, 01 once.
    np.testing.assert_allclose(usage.code_entropy(), [1, three], rtol=1e-12)
    np.testing.assert_array_equal(usage.codes_used(), [0.5, 0.5])
    assert usage.to_dict()["most_code_entropy"] == 2.0


# -- logistic regression -----------------------------------------------------------------------


def test_logistic_regression_by_hand() -> None:
    """Two classes at -1 and 1: by symmetry W = (-w, w), and w solves w = 2 s(-2w) / (2 l2)."""
    features = np.array([[-1.0], [1.0]] * 4)
    labels = np.array([0, 1] * 4)
    l2 = 0.1
    probe = fit(features, labels, 2, l2, tolerance=1e-10)
    w = probe.weights[0, 1]
    np.testing.assert_allclose(probe.weights[0], [-w, w], atol=1e-8)
    np.testing.assert_allclose(probe.bias, 0, atol=1e-8)
    # Gradient of log(1 + exp(-2w)) shared by two weights: -s(-2w) + l2 w = 0.
    assert -1 / (1 + np.exp(2 * w)) + l2 * w == pytest.approx(0, abs=1e-8)
    assert probe.accuracy(features, labels) == 1.0


def test_logistic_regression_reaches_the_optimum_from_anywhere() -> None:
    generator = np.random.default_rng(2)
    labels = np.arange(120) % 4
    features = generator.standard_normal((4, 6))[labels] + generator.standard_normal((120, 6))
    features = np.concatenate([features, np.full((120, 1), 7.0)], 1).astype(np.float32)
    cold = fit(features, labels, 4, 1e-2, tolerance=1e-8)
    warm = fit(features, labels, 4, 1e-2, start=fit(features, labels, 4, 1.0), tolerance=1e-8)
    np.testing.assert_allclose(warm.weights, cold.weights, atol=1e-6)
    # At the optimum the penalty balances the data, whatever the optimiser: l2 W = -X^T (p - y) / n.
    x = (features - cold.mean) / cold.scale
    logits = x @ cold.weights + cold.bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(1e-2 * cold.weights, -x.T @ (p - np.eye(4)[labels]) / 120, atol=1e-7)
    assert not cold.weights[6].any()  # a constant feature says nothing


# -- reconstruction ----------------------------------------------------------------------------


class Distance:
    protocol = "mean absolute difference"

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a.astype(float) - b).mean((1, 2, 3))


class Corners:
    protocol = "four pixels"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images[:, :2, :2, 0].reshape(len(images), 4) / 255


def test_reconstruction_scores(model: qlip.Model) -> None:
    images = pictures(7)
    result = evaluate_reconstruction(
        model,
        ExampleList.of_images(images),
        batch_size=3,
        lpips=Distance(),
        inception=Corners(),
        shown=2,
    )
    before, after = np.stack(images), model.reconstruct(images)
    assert result.scores["PSNR"] == pytest.approx(psnr(before, after).mean(), rel=1e-12)
    assert result.scores["SSIM"] == pytest.approx(ssim(before, after).mean(), rel=1e-12)
    assert result.scores["LPIPS"] == pytest.approx(Distance()(before, after).mean())
    sides = [Corners()(x) for x in (before, after)]
    gaussians = [Gaussian(x.mean(0), np.cov(x, rowvar=False)) for x in sides]
    assert result.scores["rFID"] == pytest.approx(frechet_distance(*gaussians), rel=1e-6)
    bits = model.encode(images).bits
    np.testing.assert_allclose(result.details["codes"]["share_of_ones"], bits.mean((0, 1)))
    assert result.scores["least share of ones in a bit"] == bits.mean((0, 1)).min()

    protocol = result.protocol
    digest = ReferenceHash()
    digest.add(before)
    assert protocol.reference == digest.hexdigest()
    assert (protocol.count, protocol.backend, protocol.dtype) == (7, "numpy", "float32")
    assert protocol.model == model.fingerprint and protocol.recipe_sha256 is None
    assert protocol.weights_sha256 == model.checkpoint.weights_sha256
    assert protocol.version == qlip.__version__
    assert "centre crop 64x64" in protocol.preprocessing
    assert protocol.metrics["LPIPS"] == "mean absolute difference"
    # Three rows of two pairs, pixels doubled.
    assert result.grid is not None and result.grid.shape == (3 * (128 + 36), 2 * 268, 3)
    shown = result.grid[16 : 16 + 128 : 2, 0:128:2]
    best = int(np.argmax(psnr(before, after)))
    np.testing.assert_array_equal(shown, images[best])


def test_one_image_has_no_distance_and_keys_may_come_twice(
    model: qlip.Model, tmp_path: Path
) -> None:
    one = evaluate_reconstruction(
        model, ExampleList.of_images(pictures(1)), inception=Corners(), shown=1
    )
    assert one.scores["rFID"] is None and one.scores["PSNR"] is not None
    a, b = (png(image) for image in pictures(2))
    write_tar(tmp_path / "a.tar", [("x", {"png": b"not a picture"}), ("y", {"png": a})])
    write_tar(tmp_path / "b.tar", [("x", {"png": b})])
    twice = evaluate_reconstruction(model, StoredExamples(str(tmp_path)), shown=2)
    assert twice.protocol.count == 2 and twice.grid is not None


def test_reconstruction_without_a_quantizer_and_of_broken_images(tmp_path: Path) -> None:
    config = CONFIGURATIONS["not_quantized"]
    qlip.save_checkpoint(tmp_path / "model", config, random_weights(config))
    plain = qlip.load(tmp_path / "model", backend="numpy")
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(pictures(2)):
        (images / f"{i}.png").write_bytes(png(image))
    (images / "bad.png").write_bytes(b"not a picture")
    result = evaluate_reconstruction(plain, StoredExamples(str(images)), shown=0)
    assert set(result.scores) == {"PSNR", "SSIM"} and result.grid is None
    assert result.protocol.count == 2 and result.failed["counts"] == {"broken image": 1}
    for path in images.glob("?.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"no usable image in it; first of 1 broken: .*bad\.png"):
        evaluate_reconstruction(plain, StoredExamples(str(images)))


# -- text and images ---------------------------------------------------------------------------


def test_classes_can_be_told_in_other_words_than_their_names(model: qlip.Model) -> None:
    examples = ExampleList(
        "two",
        [
            Example(f"{i}", image, "", name)
            for i, (image, name) in enumerate(zip(pictures(2), "ab"))
        ],
    )
    wordings = {"a": "red", "b": "green"}
    result = evaluate_zero_shot(model, examples, ["a", "b"], wordings=wordings)
    scores = model.similarity(pictures(2), ["red", "green"])
    assert result.scores["top-1"] == np.mean(scores.argmax(1) == np.arange(2))
    named = evaluate_zero_shot(model, examples, ["a", "b"])
    assert named.protocol != result.protocol  # never compared


def test_zero_shot_is_classify(model: qlip.Model) -> None:
    examples = coloured(10)
    templates = ("{}", "a picture of {}")
    result = evaluate_zero_shot(model, examples, templates=templates, batch_size=4)
    classes = sorted(COLOURS)
    images = [example.image for example in examples.examples]
    guesses = model.classify(images, classes, templates=templates).argmax(1)
    truth = [classes.index(example.label) for example in examples.examples]
    right = guesses == truth
    assert result.scores["top-1"] == right.mean()
    assert "top-5" not in result.scores  # of three classes it says nothing
    assert result.scores["chance"] == pytest.approx(1 / 3)
    for i, name in enumerate(classes):
        of_class = right[np.array(truth) == i]
        assert result.details["classes"][name]["top-1"] == of_class.mean()
        assert result.details["classes"][name]["images"] == len(of_class)
    assert result.protocol.model == weights_fingerprint(model)  # the text tower counts
    with pytest.raises(DataError, match="'blue' is not a class"):
        evaluate_zero_shot(model, examples, ["red", "green"])
    with pytest.raises(DataError, match="has no label"):
        evaluate_zero_shot(model, ExampleList.of_images(pictures(1)), ["red", "green"])
    with pytest.raises(DataError, match="2 or more"):
        evaluate_zero_shot(model, examples, ["red"])
    with pytest.raises(DataError, match="class 'red' is named more than once"):
        evaluate_zero_shot(model, examples, ["red", "green", "red"])


def test_retrieval_is_brute_force(model: qlip.Model) -> None:
    names = ["a cat", "a dog", "in a can", "a cat", "dog in a can"]
    examples = ExampleList(
        "named",
        [Example(str(i), x, c) for i, (x, c) in enumerate(zip(pictures(5), names))],
    )
    result = evaluate_retrieval(model, examples, batch_size=2)
    scores = model.similarity([e.image for e in examples.examples], names)  # [image, text]
    hits = [names[row.argmax()] == name for row, name in zip(scores, names)]
    assert result.scores["image to text R@1"] == np.mean(hits)
    assert result.scores["image to text R@5"] == 1.0
    asked = [0, 1, 2, 4]  # the fourth caption repeats the first
    found = [names[scores[:, i].argmax()] == names[i] for i in asked]
    assert result.scores["text to image R@1"] == np.mean(found)
    assert result.protocol.settings["distinct_captions"] == 4
    with pytest.raises(DataError, match="has no caption"):
        evaluate_retrieval(model, ExampleList.of_images(pictures(2)))


def test_linear_probe(model: qlip.Model) -> None:
    """Colours are there to be read even in a random encoder; labels drawn by lot are not."""
    train, test = coloured(30, seed=1), coloured(12, seed=2)
    result = evaluate_linear_probe(model, train, test)
    assert set(result.scores) == {"accuracy, cls", "accuracy, patches", "accuracy, both"}
    assert result.scores["accuracy, patches"] == 1.0
    read = []

    class Counted(ExampleList):
        def __iter__(self):
            read.append(self.name)
            return super().__iter__()

    counted = Counted(train.name, train.examples)
    again = evaluate_linear_probe(model, counted, test, batch_size=5)
    assert again.scores == result.scores and again.protocol == result.protocol
    assert read == [train.name]  # once: it may be that its pictures are rendered as they are read
    lot = [replace(e, label=str(i * 7 % 11 % 3)) for i, e in enumerate(train.examples)]
    mixed = ExampleList("mixed", lot)
    tested = ExampleList(
        "mixed", [replace(e, label=str(i % 2)) for i, e in enumerate(test.examples)]
    )
    by_lot = evaluate_linear_probe(model, mixed, tested, features=("patches",))
    assert (by_lot.scores["accuracy, patches"] or 0) < 0.8
    with pytest.raises(DataError, match="'red' is not in training"):
        evaluate_linear_probe(model, mixed, test)


# -- protocols ---------------------------------------------------------------------------------


def test_results_of_one_protocol_compare_and_others_do_not(
    model: qlip.Model, tmp_path: Path
) -> None:
    images = ExampleList.of_images(pictures(3))
    a = evaluate_reconstruction(model, images, shown=0)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(a.to_dict()))
    assert Result.load(file) == a
    # Another model, backend or name of the same pictures is what one compares.
    other = replace(a.protocol, model="x", backend="torch", dtype="bfloat16", dataset="elsewhere")
    other = replace(other, recipe_sha256=recipe_hash(tmp_path))
    assert other.recipe_sha256 is None  # as of a model that came without its recipe
    (tmp_path / "recipe.toml").write_text("seed = 1\n")
    other = replace(other, recipe_sha256=recipe_hash(tmp_path))
    assert other.recipe_sha256 == hashlib.sha256(b"seed = 1\n").hexdigest()
    assert compare(a, replace(a, protocol=other))[0] == ("PSNR", a.scores["PSNR"], a.scores["PSNR"])
    more = evaluate_reconstruction(model, images, shown=0, lpips=Distance())
    assert ("LPIPS", None, more.scores["LPIPS"]) in compare(a, more)
    fewer = evaluate_reconstruction(model, ExampleList.of_images(pictures(2), "two"), shown=0)
    with pytest.raises(QlipError, match=r"differently.* count: 3 / 2; reference: .*dataset"):
        compare(a, fewer)
    metrics = {**more.protocol.metrics, "LPIPS": "other weights"}
    changed = replace(more, protocol=replace(more.protocol, metrics=metrics))
    with pytest.raises(
        QlipError, match=r"metrics\.LPIPS: mean absolute difference / other weights"
    ):
        compare(more, changed)
    cropped = replace(a, protocol=replace(a.protocol, preprocessing="squashed"))
    with pytest.raises(QlipError, match="preprocessing: "):
        compare(a, cropped)
    file.write_text("{}")
    with pytest.raises(DataError, match="not a result"):
        Result.load(file)


def test_reference_hash_sees_pictures_order_and_labels() -> None:
    images = np.stack(pictures(2))

    def digest(x: np.ndarray, labels: list[str]) -> str:
        h = ReferenceHash()
        h.add(x, labels)
        return h.hexdigest()

    seen = {
        digest(images, ["ab", "c"]),
        digest(images, ["a", "bc"]),
        digest(images[::-1], ["ab", "c"]),
        digest(images, []),
        digest(images ^ 1, ["ab", "c"]),
    }
    assert len(seen) == 5


# -- sets --------------------------------------------------------------------------------------


def test_stored_examples(tmp_path: Path) -> None:
    folder = tmp_path / "classes"
    for name, count in (("n01", 2), ("n02", 1)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(png(pictures(1)[0]))
    (folder / "n02" / "0.txt").write_text(" a dog \n")
    names = tmp_path / "names.txt"
    names.write_text("n01\tcat\nn02\tdog\n")
    found = list(StoredExamples(str(folder), classes=read_classes(names)))
    assert [(e.key, e.label, e.caption) for e in found if isinstance(e, Example)] == [
        ("n01/0.png", "cat", ""),
        ("n01/1.png", "cat", ""),
        ("n02/0.png", "dog", "a dog"),
    ]
    assert len(list(StoredExamples(str(folder), limit=2))) == 2
    names.write_text("n01 cat\n")
    with pytest.raises(DataError, match="line 1: expected label<TAB>name"):
        read_classes(names)
    with pytest.raises(DataError, match="limit"):
        StoredExamples(str(folder), limit=0)

    # What lies beside the images of a folder is read as for training; large annotations are not needed.
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in "abcdef":
        (plain / f"{name}.png").write_bytes(png(pictures(1)[0]))
    (plain / "a.json").write_text('{"caption": "a cat", "label": 3}')
    (plain / "b.json").write_bytes(b" " * (2**20 + 1))
    (plain / "c.txt").mkdir()
    (plain / "d.txt").write_bytes(b"x" * (2**20 + 1))
    (plain / "e.txt").write_bytes(b"caf\xe9")
    (plain / "f.json").write_text("[")
    found = list(StoredExamples(f"file://{plain}"))
    assert [(e.key, e.label, e.caption) for e in found if isinstance(e, Example)] == [
        ("a.png", "3", "a cat"),
        ("b.png", "", ""),
        ("c.png", "", ""),
    ]
    assert [(e.key, e.reason) for e in found if isinstance(e, Bad)] == [
        ("d.png", "too large"),
        ("e.png", "caption is not UTF-8"),
        ("f.png", "metadata is not a JSON object"),
    ]

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, meta in (("a", {"label": 7}), ("b", {})):
            for suffix, data in (
                ("png", png(pictures(1)[0])),
                ("txt", b"a thing"),
                ("json", json.dumps(meta).encode()),
            ):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    labels = [getattr(e, "label", None) for e in StoredExamples(str(tmp_path / "0.tar"))]
    assert labels == ["7", "a thing"]


def test_batches_hold_order_and_count_the_broken(model: qlip.Model) -> None:
    listed = [Example(str(i), x) for i, x in enumerate(pictures(5))]
    listed.insert(2, Example("bad", b"no picture"))
    broken = Tally()
    keys = []
    for chunk, pixels in batches(model, listed, 2, broken):
        assert len(chunk) == len(pixels)
        keys += [example.key for example in chunk]
    assert keys == ["0", "1", "2", "3", "4"] and broken.total == 1


def test_a_part_and_the_rest_are_the_whole() -> None:
    whole = ExampleList.of_images([np.zeros((8, 8, 3), np.uint8)] * 200)
    test = [e.key for e in Part(whole, test=True)]
    train = [e.key for e in Part(whole, test=False)]
    assert sorted(test + train) == sorted(e.key for e in whole) and 20 < len(test) < 60


def test_emoji_sets_keep_seen_and_unseen_apart() -> None:
    seen, unseen = emoji.seen_class_examples(16, 200), emoji.unseen_class_examples(16, 200)
    of_seen, of_unseen = ({e.label for e in each} for each in (seen, unseen))
    assert of_seen == set(emoji.CLASS_NAMES_100) and of_unseen == set(emoji.UNSEEN_CLASS_NAMES)
    assert len(of_seen) == len(of_unseen) == 100 and not of_seen & of_unseen
    assert "seen names, unseen renderings" in seen.name and "zero-shot" not in seen.name
    assert "zero-shot: 100 unseen names" in unseen.name
    captions = [e.caption for e in emoji.seen_caption_examples(16, 60)]
    assert len(set(captions)) == 60
    assert [e.caption for e in emoji.seen_caption_examples(16, 60)] == captions
    train, test = emoji.probe_examples(16, 10)
    assert {e.key for e in train}.isdisjoint(e.key for e in test)
    assert emoji.reconstruction_examples(16).split == "held-out"


# -- learned metrics ---------------------------------------------------------------------------


def test_inception_is_the_size_of_the_published_one(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    from qlip_torch.evaluation import inception_features
    from qlip_torch.inception import Inception

    with torch.device("meta"):
        parameters = dict(Inception().named_parameters())
    # pytorch-fid's port has 23,850,960 with its classifier of 1008 classes.
    assert sum(p.numel() for p in parameters.values()) + 2048 * 1008 + 1008 == 23_850_960
    assert parameters["Mixed_6c.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert parameters["Mixed_7c.branch3x3dbl_3b.bn.weight"].shape == (384,)
    features = inception_features("random")
    assert "RANDOM" in caplog.text and "NOT FID" in features.protocol
    images = np.stack(pictures(2))
    found = features(images)
    assert found.shape == (2, 2048) and np.isfinite(found).all()
    np.testing.assert_array_equal(found, features(images))


def test_inception_weights_are_strict(tmp_path: Path) -> None:
    from qlip_torch.inception import build_inception

    write_tensors(
        tmp_path / "w.safetensors",
        {"Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 5, 5), np.float32), "fc.bias": np.zeros(2)}
        | {"other": np.zeros(1, np.float32)},
        dtype="float32",
    )
    with pytest.raises(CheckpointError, match=r"missing .*and \d+ more"):
        build_inception(str(tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError, match=r"Inception weights.*not a hub id"):
        build_inception(str(tmp_path / "absent.safetensors"))


def test_inceptions_pooling_is_tensorflows() -> None:
    """Averages leave the padding out; the last block takes the maximum."""
    import torch

    from qlip_torch.inception import BlockE, _average

    ones = torch.ones(1, 1, 4, 4)
    torch.testing.assert_close(_average(ones), ones)
    torch.manual_seed(0)
    x = torch.rand(1, 1280, 4, 4)
    blocks = [BlockE(1280, maximum=maximum).eval() for maximum in (False, True)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    with torch.inference_mode():
        mean, maximum = (block(x) for block in blocks)
    assert torch.equal(mean[:, :1856], maximum[:, :1856])
    pooled = torch.nn.functional.max_pool2d(x, 3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(maximum[:, 1856:], blocks[1].branch_pool(pooled))


def test_lpips_metric_is_the_training_module() -> None:
    import torch

    from qlip_torch.evaluation import lpips_metric
    from qlip_torch.perceptual import build_perceptual

    a, b = np.stack(pictures(3)), np.stack(pictures(3, seed=1))
    metric = lpips_metric("random")
    x, y = (torch.from_numpy(i).permute(0, 3, 1, 2).float() / 255 * 2 - 1 for i in (a, b))
    expected = build_perceptual("random").distances(x, y).numpy()
    np.testing.assert_allclose(metric(a, b), expected, rtol=1e-4)
    assert "NOT LPIPS" in metric.protocol
    np.testing.assert_allclose(metric(a, a), 0, atol=1e-6)


def test_learned_metrics_convolve_exactly_and_leave_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from qlip_torch.evaluation import lpips_metric

    cudnn = torch.backends.cudnn
    metric, seen = lpips_metric("random"), []
    monkeypatch.setattr(cudnn, "deterministic", True)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: seen.append((cudnn.allow_tf32, cudnn.deterministic))
    )
    with hook:
        metric(np.stack(pictures(1)), np.stack(pictures(1, seed=1)))
    assert set(seen) == {(False, True)}
    assert cudnn.allow_tf32 and cudnn.deterministic


# -- the command -------------------------------------------------------------------------------


def test_eval_recon_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlip_cli.main import main

    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i, image in enumerate(pictures(3)):
        (images / f"{i}.png").write_bytes(png(image))
    command = [
        "eval",
        "recon",
        str(folder),
        str(images),
        "--backend",
        "numpy",
        "--out",
        str(out),
    ]
    assert main([*command, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["protocol"]["count"] == 3
    assert Result.load(out / "reconstruction.json").scores == result["scores"]
    with Image.open(out / "reconstruction.png") as grid:
        assert grid.size == (3 * 268, 3 * 164)
    assert main(command) == 2  # what exists stays
    assert "already exists" in capsys.readouterr().err
    assert main([*command, "--force", "--limit", "2"]) == 0
    assert "PSNR" in capsys.readouterr().out
    (tmp_path / "old.json").write_text(json.dumps({k: result[k] for k in result if k != "name"}))
    assert main(["eval", "compare", str(tmp_path / "old.json"), str(tmp_path / "old.json")]) == 0
    assert "PSNR" in capsys.readouterr().out
    files = [str(tmp_path / "old.json"), str(out / "reconstruction.json")]
    assert main(["eval", "compare", *files]) == 2
    assert "count: 3 / 2" in capsys.readouterr().err
    for text, expected in (
        ("", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", "not a result of `qlip eval`"),
        ('{"protocol": {"x": 1}}', "not a result of `qlip eval`"),
        (None, "cannot be read (no such file or directory)"),
    ):
        bad = tmp_path / f"{'absent' if text is None else 'bad'}.json"
        if text is not None:
            bad.write_text(text)
        assert main(["eval", "compare", str(bad), str(tmp_path / "old.json")]) == 2
        assert f"error: {bad}: {expected}" in capsys.readouterr().err


def test_eval_commands_on_a_folder_of_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlip_cli.main import main

    for example in coloured(30).examples:
        path = tmp_path / "data" / example.label / f"{example.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert isinstance(example.image, np.ndarray)
        path.write_bytes(png(example.image))
        path.with_suffix(".txt").write_text(example.caption)
    templates = tmp_path / "templates.txt"
    templates.write_text("{}\na {} thing\n")
    shared = [str(folder), str(tmp_path / "data"), "--backend", "numpy", "--json"]
    assert main(["eval", "zero-shot", *shared, "--templates", str(templates)]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["protocol"]["settings"]["templates"] == ["{}", "a {} thing"]
    assert set(result["details"]["classes"]) == set(COLOURS)
    assert main(["eval", "retrieval", *shared]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["protocol"]["settings"]["distinct_captions"] == 3
    assert main(["eval", "linear-probe", *shared, "--features", "patches"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["scores"] == {"accuracy, patches": 1.0}
    (tmp_path / "data" / "red" / "bad.png").write_bytes(b"no picture")
    assert main(["eval", "recon", *shared]) == 1
    assert "bad.png" in capsys.readouterr().err


def test_eval_of_emoji_names_what_is_zero_shot(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlip_cli.main import main

    shared = [str(folder), "emoji", "--backend", "numpy", "--limit", "4", "--json"]
    for task, names in (
        (
            "zero-shot",
            ["seen-names", "zero-shot-unseen-names", "zero-shot-unseen-described"],
        ),
        ("retrieval", ["retrieval-seen-names", "retrieval-zero-shot-unseen-names"]),
    ):
        assert main(["eval", task, *shared]) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        assert [r["name"] for r in results] == names
        assert all("unseen" in result["protocol"]["dataset"] for result in results[1:])


def test_data_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qlip_cli.main import main

    out = tmp_path / "set"
    command = ["data", "emoji", str(out), "--count", "5", "--size", "16", "--split", "unseen"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "unseen"
    assert main(command) == 2
    assert "already holds dataset.json" in capsys.readouterr().err
    assert main(["data", "emoji", str(out), "--split", "all"]) == 2
    assert "must be one of train, held-out" in capsys.readouterr().err
    assert main(["data", "check", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["good"] == 5
    tar = out / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:4000])
    assert main(["data", "check", str(out)]) == 1
    assert "broken" in capsys.readouterr().out
