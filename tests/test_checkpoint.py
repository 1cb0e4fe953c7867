"""Checkpoints found, checked, read and written; and every way in which one can be wrong."""

from __future__ import annotations

import functools
import json
import pickle
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qlip_core as qlip
from qlip_core import hub
from qlip_core.architecture import architecture
from qlip_core.errors import CheckpointError, ConfigError
from qlip_core.evaluation.clip_score import is_plain_clip
from qlip_core.tensorfile import TensorFile, to_bfloat16, write_tensors


@pytest.fixture
def copy(official: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(official, tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_reads_what_safetensors_reads(official: Path) -> None:
    checkpoint = qlip.open_checkpoint(official)
    theirs = load_file(official / "model.safetensors")
    ours = checkpoint.tensors()
    assert set(theirs) - set(ours) == {n for n in theirs if "rope.freqs" in n}
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name])
    assert set(checkpoint.part("down")) == {
        f"vision_model.quant_embed.{n}.{k}" for n in ("c_fc", "c_proj") for k in ("weight", "bias")
    }


def test_folder_file_and_shards_are_the_same_model(copy: Path) -> None:
    whole = qlip.open_checkpoint(copy)
    single = qlip.open_checkpoint(copy / "model.safetensors")
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:50], names[50:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, copy / file)
        weight_map |= dict.fromkeys(part, file)
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    sharded = qlip.open_checkpoint(copy)
    assert whole.fingerprint == single.fingerprint == sharded.fingerprint
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names model-00002-of-00002"):
        qlip.open_checkpoint(copy)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/x.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a readable index"):
        qlip.open_checkpoint(copy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_written_checkpoints_come_back(official: Path, tmp_path: Path, dtype: str) -> None:
    source = qlip.open_checkpoint(official)
    weights = source.tensors()
    folder = qlip.save_checkpoint(tmp_path / "out", source.config, weights, dtype=dtype)
    assert json.loads((folder / "config.json").read_text()) == source.config.to_dict()
    back = qlip.open_checkpoint(folder)
    tolerance = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for name, values in back.tensors().items():
        assert isinstance(values, np.ndarray) and values.shape == weights[name].shape
        np.testing.assert_allclose(
            values, weights[name], rtol=tolerance, atol=1e-6 * (tolerance > 0)
        )
    assert (back.fingerprint == source.fingerprint) == (dtype == "float32")
    # Any other reader of the format can open it.
    if dtype != "bfloat16":
        assert set(load_file(folder / "model.safetensors")) == set(architecture(source.config))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159], np.float32)
    torch = pytest.importorskip("torch")
    expected = torch.tensor(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bfloat16(values), expected)
    write_tensors(tmp_path / "a.safetensors", {"x": values}, dtype="bfloat16")
    back = TensorFile(tmp_path / "a.safetensors").float32("x")
    np.testing.assert_array_equal(back, torch.tensor(values).bfloat16().float().numpy())


def test_fingerprint_tells_models_apart(copy: Path) -> None:
    before = qlip.open_checkpoint(copy).fingerprint

    def nudge(name: str):
        def change(tensors: dict) -> None:
            tensors[name] = tensors[name] + np.float32(1e-4)

        return change

    rewrite(copy, nudge("text_model.final_layer_norm.bias"))
    assert (
        qlip.open_checkpoint(copy).fingerprint == before
    )  # tokens do not depend on the text tower
    rewrite(copy, nudge("vision_decoder.conv_out.weight"))
    assert qlip.open_checkpoint(copy).fingerprint != before


def test_the_hash_of_all_weights_covers_every_value(copy: Path) -> None:
    def touch(name: str) -> None:
        def change(tensors: dict) -> None:
            tensors[name] = tensors[name].copy()
            tensors[name].reshape(-1)[-1] += np.float32(1e-4)

        rewrite(copy, change)

    found = {qlip.open_checkpoint(copy).weights_sha256}
    for name in ("text_projection.weight", "vision_decoder.conv_out.weight"):
        touch(name)
        found.add(qlip.open_checkpoint(copy).weights_sha256)
    assert len(found) == 3


def test_wrong_weights_are_named(copy: Path, official: Path) -> None:
    original = (copy / "model.safetensors").read_bytes()

    def check(change, message: str, *, on_read: bool = False) -> None:
        (copy / "model.safetensors").write_bytes(original)
        rewrite(copy, change)
        with pytest.raises(CheckpointError, match=message):
            checkpoint = qlip.open_checkpoint(copy)
            if on_read:
                checkpoint.tensors()

    name = "vision_decoder.norm.weight"
    check(lambda t: t.pop(name), f"missing: {name}")
    check(lambda t: t.update(extra=np.zeros(3)), "unexpected: extra")
    check(lambda t: t.update({name: np.zeros((2, 3), np.float32)}), r"is \[2, 3\], expected \[64\]")
    nan = np.full(64, np.nan, np.float32)
    check(lambda t: t.update({name: nan}), f"{name} has 64 values that are NaN", on_read=True)
    whole = np.zeros(64, np.int64)
    check(lambda t: t.update({name: whole}), f"must be stored as one of .*: {name} as I64")
    many = {f"extra.{i:03}": nan for i in range(101)}
    check(lambda t: t.update(many), r"unexpected: extra\.000, .*, extra\.099 and 1 more$")


def test_damaged_files(copy: Path) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message) as caught:
            qlip.open_checkpoint(copy)
        assert "\n" not in str(caught.value)

    refused(whole[:-10], "cut short or damaged")
    refused(whole[:1000], "cut short")
    refused(b"", "only 0 bytes")
    refused(pickle.dumps({"a": 1}), "pickle")
    refused(b"PK\x03\x04" + bytes(100), "torch archive")
    refused(struct.pack("<Q", 2**40) + bytes(64), "not a safetensors file$")
    refused(struct.pack("<Q", 2**20) + bytes(64), r"header of 1048576 bytes, file of 72\)")
    refused(struct.pack("<Q", 10) + b"not json!!", "header is damaged")

    def header(entry: dict) -> bytes:
        text = json.dumps({"x": entry}).encode()
        return struct.pack("<Q", len(text)) + text + bytes(16)

    # A shape that would ask for petabytes, offsets outside the file, negative sizes, a foreign type.
    refused(header({"dtype": "F32", "shape": [2**50], "data_offsets": [0, 16]}), "does not fill")
    refused(header({"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}), "does not fill")
    refused(header({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}), "damaged")
    refused(header({"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]}), "unsupported type Q4")


def test_what_is_not_there(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder or file, and not a hub id"):
        qlip.open_checkpoint("./absent/folder/here")
    with pytest.raises(CheckpointError, match="pickled weights are never loaded"):
        qlip.open_checkpoint(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a model folder"):
        qlip.open_checkpoint(tmp_path)
    for stage in (1, 2):
        (tmp_path / "run" / f"stage{stage}" / "model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"this run made is .*stage2.model"):
        qlip.open_checkpoint(tmp_path / "run")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"no model.safetensors in it; pytorch_model.bin is a"
    ):
        qlip.open_checkpoint(copy)
    with pytest.raises(CheckpointError, match="a revision is only for hub ids"):
        qlip.open_checkpoint(copy, revision="main")


def test_config_errors_name_the_file(copy: Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    values["vision_config"]["num_head"] = 4
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config.json: unknown key .vision_config.num_head"):
        qlip.open_checkpoint(copy)


def test_writing_over_a_folder_leaves_what_is_not_the_models(
    official: Path, tmp_path: Path
) -> None:
    checkpoint = qlip.open_checkpoint(official)
    out = tmp_path / "out"
    (out / "generator").mkdir(parents=True)
    for name in (
        "notes.txt",
        "generator/config.json",
        "model-00001-of-00002.safetensors",
        "vocab.json",
    ):
        (out / name).write_text("old")
    weights = checkpoint.tensors()
    qlip.save_checkpoint(out, checkpoint.config, weights, beside={"recipe.toml": "a = 1\n"})
    assert (out / "notes.txt").read_text() == (out / "generator/config.json").read_text() == "old"
    assert (out / "recipe.toml").read_text() == "a = 1\n"
    # Parts of an older model would be read as the new one's.
    assert not list(out.glob("model-*")) and not (out / "vocab.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # What is said of the model goes with it, also behind a link.
    (tmp_path / "link").symlink_to(out)
    qlip.save_checkpoint(tmp_path / "link", checkpoint.config, weights)
    assert not (out / "recipe.toml").exists() and (out / "notes.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
    assert qlip.open_checkpoint(out).fingerprint == checkpoint.fingerprint


@pytest.mark.parametrize(
    ("tower", "key", "value"),
    [
        ("vision_config", "num_attention_heads", 2),
        ("vision_config", "rope", False),
        ("vision_config", "layer_norm_eps", 1e-3),
        ("decoder_config", "layer_norm_eps", 1e-3),
    ],
)
def test_a_fingerprint_covers_settings_that_have_no_tensor(
    official: Path, tmp_path: Path, tower: str, key: str, value: object
) -> None:
    copy = shutil.copytree(official, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    assert values[tower].get(key) != value
    values[tower][key] = value
    (copy / "config.json").write_text(json.dumps(values))
    before, after = qlip.open_checkpoint(official), qlip.open_checkpoint(copy)
    assert before.fingerprint != after.fingerprint
    assert before.text_fingerprint == after.text_fingerprint


def test_a_fingerprint_covers_the_normalisation_of_pixels(official: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(official, tmp_path / "copy")
    values = json.loads((copy / "preprocessor_config.json").read_text())
    values["image_mean"] = [0.5, 0.5, 0.5]
    (copy / "preprocessor_config.json").write_text(json.dumps(values))
    assert qlip.open_checkpoint(official).fingerprint != qlip.open_checkpoint(copy).fingerprint


@pytest.mark.parametrize("content", ["[" * 100_000, '{"projection_dim": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_read_is_named(
    official: Path, tmp_path: Path, content: str
) -> None:
    copy = shutil.copytree(official, tmp_path / "copy")
    (copy / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json: not a readable JSON"):
        qlip.open_checkpoint(copy)
    assert not is_plain_clip(copy)  # which opens it all the same, to say that


def test_layers_are_counted_before_they_are_listed(official: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(official, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    values["text_config"]["num_hidden_layers"] = 10**9
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="is over 1024"):
        qlip.open_checkpoint(copy)


def test_refuses_to_write_what_it_would_not_read(official: Path, tmp_path: Path) -> None:
    checkpoint = qlip.open_checkpoint(official)
    weights = checkpoint.tensors()
    bad = {**weights, "logit_scale": np.array(np.inf, np.float32)}
    with pytest.raises(CheckpointError, match="logit_scale has NaN or infinite"):
        qlip.save_checkpoint(tmp_path / "out", checkpoint.config, bad)
    for dtype, value in (("float16", 1e6), ("bfloat16", 3.4e38)):
        bad["logit_scale"] = np.array(-value, np.float32)
        message = rf"logit_scale has values up to {value:g}, which are infinite in {dtype}"
        with pytest.raises(CheckpointError, match=re.escape(message)):
            qlip.save_checkpoint(tmp_path / "out", checkpoint.config, bad, dtype=dtype)
    del weights["logit_scale"]
    with pytest.raises(CheckpointError, match="missing: logit_scale"):
        qlip.save_checkpoint(tmp_path / "out", checkpoint.config, weights)
    assert not list(tmp_path.iterdir())


def test_licence_and_note_come_from_the_card(copy: Path) -> None:
    assert qlip.open_checkpoint(copy).license is None
    card = "---\nlicense: cc-by-nc-4.0\ntags:\n- clip\nnote: 'derived'\n---\nlicense: mit\n"
    (copy / "README.md").write_text(card)
    checkpoint = qlip.open_checkpoint(copy)
    assert (checkpoint.license, checkpoint.note) == ("cc-by-nc-4.0", "derived")


# -- the hub, without a network ----------------------------------------------------------------


def cached(root: Path, official: Path, name: str = "some/model") -> Path:
    """A model in the hub's cache, as a download leaves it."""
    repo = root / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(official, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    pytest.importorskip("huggingface_hub")
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    here = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", here)
    return tmp_path


def test_a_cached_hub_model_works_offline(offline: Path, official: Path) -> None:
    snapshot = cached(offline, official)
    checkpoint = qlip.open_checkpoint("some/model")
    assert checkpoint.folder == snapshot
    assert checkpoint.fingerprint == qlip.open_checkpoint(official).fingerprint
    assert hub.hub_id(checkpoint.folder) == "some/model"


def test_an_uncached_hub_model_says_what_to_do(offline: Path) -> None:
    with pytest.raises(CheckpointError, match="not in the local cache, and the hub cannot be") as e:
        qlip.open_checkpoint("nobody/nothing")
    assert "\n" not in str(e.value)
