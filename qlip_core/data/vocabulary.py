"""A small BPE vocabulary in CLIP's layout, trained on given texts.

CLIP's rules throughout: lower case, runs of white space to one space, words split by its pattern, bytes
written as characters, the last symbol of a word marked with "</w>". Every byte is in the vocabulary in
both forms, so any text encodes. The two special tokens have the last two ids.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from qlip_core.errors import DataError
from qlip_core.files import write_text
from qlip_core.text import END, END_OF_WORD, PATTERN, START


def byte_symbols() -> list[str]:
    """The character that stands for each byte, in the order of CLIP's vocabulary.

    Bytes that print stand for themselves and come first; the others are U+0100 onwards.
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in prints] + [chr(0x100 + k) for k in range(256 - len(prints))]


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: str | Path,
    *,
    context_length: int = 77,
) -> int:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json to `out_dir`.

    Returns the size of the vocabulary: `vocab_size`, or less if the texts have no more pairs to merge.
    The same texts give the same files. Raises DataError if `vocab_size` does not hold the 512 byte
    symbols and the 2 special tokens.
    """
    symbols = byte_symbols()
    alphabet = symbols + [symbol + END_OF_WORD for symbol in symbols]
    if vocab_size < len(alphabet) + 2:
        raise DataError(f"vocab_size {vocab_size}: must be at least {len(alphabet) + 2}")
    vocabulary, merges = _learn(texts, vocab_size - 2, alphabet)
    for token in (START, END):
        vocabulary[token] = len(vocabulary)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": context_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_text(out / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    write_text(out / "merges.txt", "\n".join(lines) + "\n")
    write_text(out / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    write_text(out / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    return len(vocabulary)


def _learn(
    texts: Iterable[str], vocab_size: int, alphabet: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token to id, merges in order), the alphabet first."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        end_of_word_suffix=END_OF_WORD,
        # The trainer would number the marked bytes in the order of a hash map, which differs from run to run,
        # and break ties between pairs by these numbers. Listing them beforehand fixes their order.
        special_tokens=alphabet,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    return model["vocab"], merges
