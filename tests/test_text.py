"""CLIP's byte-pair encoding on a small vocabulary, worked by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MERGES, byte_symbols

from qlip_core.config import TextConfig
from qlip_core.errors import TextError
from qlip_core.text import Tokenizer, check_ids, read_merges

CONFIG = TextConfig(vocab_size=520, max_position_embeddings=12, bos_token_id=518, eos_token_id=519)
START, END = 518, 519
CAT, DOG = 512 + MERGES.index(("ca", "t</w>")), 512 + MERGES.index(("do", "g</w>"))
AN = 512 + MERGES.index(("a", "n"))


def symbol(text: str, *, last: bool = True) -> int:
    return byte_symbols().index(text) + (256 if last else 0)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    found = Tokenizer.from_folder(tokenizer_folder, CONFIG)
    assert found is not None
    return found


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the text alone."""
    row = tokenizer([text])[0].tolist()
    return row[1 : row.index(END)]


def test_frame_and_padding(tokenizer: Tokenizer) -> None:
    out = tokenizer(["cat dog", ""])
    assert out.dtype == np.int64 and out.shape == (2, 12)
    assert out[0].tolist() == [START, CAT, DOG] + [END] * 9  # the pad token is the end token
    assert out[1].tolist() == [START] + [END] * 11
    assert tokenizer.count(["cat dog", ""]) == [4, 2]


def test_words_are_cut_as_clip_cuts_them(tokenizer: Tokenizer) -> None:
    assert ids(tokenizer, "  CAT \n\t cat ") == [CAT, CAT]  # lower case, white space
    assert ids(tokenizer, "cat's") == [CAT, symbol("'", last=False), symbol("s")]
    assert ids(tokenizer, "12") == [symbol("1"), symbol("2")]  # digits stand alone
    assert ids(tokenizer, "cat!?dog") == [CAT, symbol("!", last=False), symbol("?"), DOG]
    # "an" is in the vocabulary only as the beginning of a word.
    assert ids(tokenizer, "and") == [AN, symbol("d")]
    # e-acute: composed by NFC, then two UTF-8 bytes.
    composed = [symbol("Ã", last=False), symbol("©")]
    assert ids(tokenizer, "é") == ids(tokenizer, "é") == composed


def test_long_text_keeps_its_end_token(tokenizer: Tokenizer) -> None:
    out = tokenizer(["cat " * 50])[0]
    assert out.tolist() == [START] + [CAT] * 10 + [END]


def test_text_that_spells_a_special_token_is_text(tokenizer: Tokenizer) -> None:
    row = tokenizer(["<|endoftext|>"])[0]
    assert row[1] == symbol("<", last=False) and END not in row[1:11].tolist()


def test_whole_tokenizer_file_gives_the_same(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer._bpe.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(tokenizer_folder / "special_tokens_map.json", tmp_path)
    other = Tokenizer.from_folder(tmp_path, CONFIG)
    assert other is not None
    texts = ["a cat's dog", "<|startoftext|> 12 é", "and 🐱", ""]
    np.testing.assert_array_equal(other(texts), tokenizer(texts))


def test_pad_token_falls_back_to_the_config(tokenizer_folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_folder / name, tmp_path)
    config = TextConfig(
        vocab_size=520,
        max_position_embeddings=5,
        pad_token_id=7,
        bos_token_id=518,
        eos_token_id=519,
    )
    found = Tokenizer.from_folder(tmp_path, config)
    assert found is not None
    assert found(["cat"])[0].tolist() == [START, CAT, END, 7, 7]


def test_a_tokenizer_of_another_model_is_refused(tokenizer_folder: Path) -> None:
    other = replace(CONFIG, eos_token_id=7)
    with pytest.raises(TextError, match="ends texts with id 519, the text tower looks for 7"):
        Tokenizer.from_folder(tokenizer_folder, other)
    assert Tokenizer.from_folder(tokenizer_folder, replace(CONFIG, eos_token_id=2)) is not None


def test_absent_and_damaged_files(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path, CONFIG) is None
    with pytest.raises(TextError, match="the tokenizer has 520 tokens, the text tower only 100"):
        Tokenizer.from_folder(tokenizer_folder, TextConfig(vocab_size=100))
    shutil.copy(tokenizer_folder / "vocab.json", tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nc a t\n")
    with pytest.raises(TextError, match="line 3 is not a merge of two tokens: 'c a t'"):
        read_merges(tmp_path / "merges.txt")
    (tmp_path / "merges.txt").write_text("q q\n")
    with pytest.raises(TextError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path, CONFIG)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(TextError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path, CONFIG)


@pytest.mark.parametrize("content", ["{,", "[1]", "[" * 100_000])
def test_a_damaged_map_of_special_tokens_is_named(
    tokenizer_folder: Path, tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    (folder / "special_tokens_map.json").write_text(content)
    with pytest.raises(TextError, match=r"special_tokens_map\.json: not a readable JSON object"):
        Tokenizer.from_folder(folder, CONFIG)


def test_wrong_texts_and_ids(tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError, match="expected a string, got int"):
        tokenizer([3])  # type: ignore[list-item]
    with pytest.raises(TextError, match="not valid Unicode"):
        tokenizer(["\ud800"])
    assert check_ids(np.array([[1, 519]], np.uint16), CONFIG).dtype == np.int64
    for bad, message in (
        (np.array([1, 2]), r"integers \[B, T\]"),
        (np.array([[1.0]]), "integers"),
        (np.zeros((1, 13), int), "13 token ids per text"),
        (np.array([[520]]), "run from 520 to 520; the vocabulary has 520"),
        (np.array([[-1]]), "run from -1"),
    ):
        with pytest.raises(TextError, match=message):
            check_ids(bad, CONFIG)
