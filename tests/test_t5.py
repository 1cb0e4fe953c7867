"""FLAN-T5 as a conditioner, with a tiny random one made here."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import qlip_core as qlip
from qlip_core.errors import CheckpointError
from qlip_core.generator.conditioning import encode_prompts, t5
from qlip_core.generator.config import GeneratorConfig
from qlip_torch.backend import TorchBackend
from qlip_torch.t5 import T5Encoder

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=7, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_captions_end_together(folder: Path) -> None:
    encoder = T5Encoder(str(folder), 5, "cpu")
    features, valid = encoder(["a cat", "a red dog cat a dog", "zebra"])
    np.testing.assert_array_equal(valid, [[0, 0, 1, 1, 1], [1] * 5, [0, 0, 0, 1, 1]])
    model = T5EncoderModel.from_pretrained(folder).eval()
    for row, ids in ((0, [3, 4, 1]), (1, [3, 6, 5, 4, 1]), (2, [2, 1])):
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].detach().numpy()
        np.testing.assert_allclose(features[row, 5 - len(ids) :], states, atol=1e-5)
        assert (features[row, : 5 - len(ids)] == 0).all()
    assert encoder.count(["a cat", "a red dog cat a dog"]) == [3, 7]
    assert T5Encoder("nowhere", 5, "cpu").count([]) == []  # nothing to encode, nothing loaded


def test_generators_name_their_t5(folder: Path, tmp_path: Path) -> None:
    config = GeneratorConfig(
        16, 1, 2, conditioner="t5", t5_model=str(folder), condition_size=16, prefix_length=4
    )
    captions = encode_prompts(["a cat", ""], t5(config), config)
    assert captions.features.shape == (2, 4, 16) and captions.null.tolist() == [False, True]
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot be loaded"):
        encode_prompts(["a"], t5(replace(config, t5_model=str(tmp_path))), config)


def test_a_t5_that_lacks_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would fill them with random values."""
    shutil.copytree(folder, tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    for broken, message in (
        ({k: v for k, v in weights.items() if k != name}, f"weights are missing: {name}"),
        (weights | {name: weights[name] * float("nan")}, f"tensor {name} has NaN"),
    ):
        save_file(broken, tmp_path / "t5" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            T5Encoder(str(tmp_path / "t5"), 5, "cpu")(["a"])


def test_a_t5_beside_the_generator_is_found_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GeneratorConfig(
        16, 1, 2, conditioner="t5", t5_model="t5", condition_size=16, prefix_length=4
    )
    shutil.copytree(folder, tmp_path / "generator" / "t5")
    captions = encode_prompts(["a cat"], t5(config, tmp_path / "generator", "cpu"), config)
    assert captions.features.any()
    # Training notes where it was.
    monkeypatch.chdir(tmp_path / "generator")
    fitted = config.fitted(qlip.PRESETS["tiny"])
    assert fitted.t5_model == str(tmp_path / "generator" / "t5")
    assert replace(config, t5_model="google/x").fitted(qlip.PRESETS["tiny"]).t5_model == "google/x"


@pytest.mark.parametrize("name", ["./t5", "/nowhere/t5", "runs/t5/small", "t5"])
def test_a_path_is_no_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # asking would be a TypeError
    with pytest.raises(CheckpointError, match=f"{name}: no such folder or file, and not a hub id"):
        T5Encoder(name, 5, "cpu")(["a"])


@pytest.mark.parametrize(
    ("device", "chosen"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("gpu", "cuda:0")]
)
def test_t5_goes_where_the_model_is(
    device: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchBackend, "devices", lambda self: ["cuda:0", "cuda:1", "cpu"])
    config = GeneratorConfig(16, 1, 2, conditioner="t5", condition_size=16)
    assert t5(config, device=device)._device == chosen  # type: ignore[attr-defined]
