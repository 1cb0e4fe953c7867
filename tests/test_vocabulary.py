"""BPE vocabularies in CLIP's layout."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from qlip_core.data.captions import caption_corpus
from qlip_core.data.emoji_names import all_glyphs
from qlip_core.data.vocabulary import byte_symbols, train_bpe
from qlip_core.errors import DataError
from qlip_core.text import END, END_OF_WORD, START, build_bpe


def clip_tokenizer(folder: Path) -> Tokenizer:
    return build_bpe(folder / "vocab.json", folder / "merges.txt")


def test_byte_symbols_are_clips():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert symbols[:3] == ["!", '"', "#"]
    # Space is byte 32, the 33rd that does not print: U+0120.
    assert symbols[188 + 32] == "\u0120"


def test_merges_of_a_worked_corpus(tmp_path: Path):
    # Pairs: (a, b</w>) 5 times, (c, d</w>) 3 times, (x, y</w>) once: too rare.
    size = train_bpe(["ab AB ab", "ab  ab cd", "cd cd xy"], 600, tmp_path)
    assert size == 512 + 2 + 2
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges == ["#version: 0.2", "a b</w>", "c d</w>"]
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary["ab</w>"] == 512 and vocabulary["cd</w>"] == 513
    assert vocabulary[START] == 514 and vocabulary[END] == 515
    assert sorted(vocabulary.values()) == list(range(516))


def test_any_text_encodes_and_comes_back(tmp_path: Path):
    train_bpe(caption_corpus(), 1024, tmp_path)
    tokenizer = clip_tokenizer(tmp_path)
    unknown = tokenizer.token_to_id(END)
    for text in (
        "a cat",
        "zürich 42% 猫 🐈 \x00",
        "don't",
        "ÿ~¡",
        "".join(map(chr, range(33, 384))),
    ):
        ids = tokenizer.encode(text).ids
        assert unknown not in ids
        spelled = "".join(tokenizer.encode(text).tokens).replace(END_OF_WORD, "")
        raw = bytes(byte_of(symbol) for symbol in spelled)
        assert raw.decode() == re.sub(r"\s", "", unicodedata.normalize("NFC", text).lower())


def byte_of(symbol: str) -> int:
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return [*prints, *others][byte_symbols().index(symbol)]


def test_the_same_texts_give_the_same_files(tmp_path: Path):
    for folder in ("a", "b"):
        assert train_bpe(caption_corpus(), 1024, tmp_path / folder) == 1024
    names = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_names_are_short_in_a_vocabulary_of_their_own(tmp_path: Path):
    train_bpe(caption_corpus(), 2048, tmp_path)
    tokenizer = clip_tokenizer(tmp_path)
    assert tokenizer.encode("a cat on a red background").tokens == [
        f"{word}{END_OF_WORD}" for word in ("a", "cat", "on", "a", "red", "background")
    ]
    for glyph in all_glyphs():
        assert len(tokenizer.encode(glyph.name).ids) <= 24


def test_settings_name_clips_tokens(tmp_path: Path):
    train_bpe(["a cat", "a cat"], 520, tmp_path, context_length=32)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 32 and settings["tokenizer_class"] == "CLIPTokenizer"
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert special["bos_token"] == START and special["eos_token"] == END


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="vocab_size 513: must be at least 514"):
        train_bpe(["a"], 513, tmp_path)
