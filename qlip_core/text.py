"""Text in: CLIP's byte-pair encoding through `tokenizers` (SPEC section 2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlip_core.config import TextConfig
from qlip_core.errors import TextError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Bpe

FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
START, END = "<|startoftext|>", "<|endoftext|>"

# How CLIP splits text into words before merging bytes: contractions, letters, single digits, the rest.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
END_OF_WORD = "</w>"


class Tokenizer:
    """Strings -> token ids int64 [B, T]: start token, text, end token, padded with the pad token."""

    def __init__(self, bpe: Bpe, *, start: int, end: int, pad: int, length: int) -> None:
        self.start, self.end, self.pad, self.length = start, end, pad, length
        bpe.no_truncation()
        bpe.no_padding()
        # Text that spells "<|endoftext|>" is ordinary text, never the token.
        bpe.encode_special_tokens = True
        self._bpe = bpe

    @classmethod
    def from_folder(cls, folder: str | Path, config: TextConfig) -> Tokenizer | None:
        """The tokenizer of a checkpoint, or None if the folder has no tokenizer files.

        Raises TextError for damaged files, or ids outside the model's vocabulary.
        """
        folder = Path(folder)
        whole, vocab, merges = (folder / name for name in FILES[:3])
        if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
            return None
        try:
            bpe = _load(whole) if whole.is_file() else build_bpe(vocab, merges)
        except TextError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for anything wrong in a file
            raise TextError(f"{folder}: tokenizer files cannot be read ({error})") from None
        if bpe.get_vocab_size() > config.vocab_size:
            raise TextError(
                f"{folder}: the tokenizer has {bpe.get_vocab_size()} tokens, "
                f"the text tower only {config.vocab_size}"
            )

        def special(kind: str, fallback: int) -> int:
            name = _special_name(folder, kind)
            found = bpe.token_to_id(name) if name else None
            return fallback if found is None else found

        end = special("eos_token", config.eos_token_id)
        if config.eos_token_id not in (end, 2):  # 2 is the old CLIP rule, which uses no id
            raise TextError(
                f"{folder}: the tokenizer ends texts with id {end}, the text tower looks for "
                f"{config.eos_token_id}: the tokenizer files belong to another model"
            )
        return cls(
            bpe,
            start=special("bos_token", config.bos_token_id),
            end=end,
            pad=special("pad_token", config.pad_token_id),
            length=config.max_position_embeddings,
        )

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [B, T], T = max_position_embeddings; long text is cut so that the end token stays."""
        out = np.full((len(texts), self.length), self.pad, np.int64)
        for row, encoding in zip(out, self._encode(texts)):
            ids = [self.start, *encoding.ids[: self.length - 2], self.end]
            row[: len(ids)] = ids
        return out

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text with its start and end token, before any cut."""
        return [len(encoding.ids) + 2 for encoding in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        for text in texts:
            if not isinstance(text, str):
                raise TextError(f"expected a string, got {type(text).__name__}")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise TextError(f"{text!r} has lone surrogates: not valid Unicode") from None
        return self._bpe.encode_batch(list(texts), add_special_tokens=False)


def build_bpe(vocab: Path, merges: Path) -> Bpe:
    """CLIP's tokenizer from its two files."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Bpe

    table = json.loads(vocab.read_text(encoding="utf-8"))
    model = models.BPE(
        vocab=table,
        merges=read_merges(merges),
        continuing_subword_prefix="",
        end_of_word_suffix=END_OF_WORD,
        unk_token=END if END in table else None,
    )
    bpe = Bpe(model)
    bpe.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    bpe.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (START, END) if t in table]
    )
    return bpe


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of a `merges.txt`, in order of rank; its first line may name a version."""
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise TextError(f"{path}: line {number} is not a merge of two tokens: {line!r}")
        merges.append((pair[0], pair[1]))
    return merges


def _load(path: Path) -> Bpe:
    from tokenizers import Tokenizer as Bpe

    return Bpe.from_file(str(path))


def _special_name(folder: Path, kind: str) -> str | None:
    """The text of a special token ("pad_token"), from special_tokens_map or tokenizer_config."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                value = json.loads(path.read_text(encoding="utf-8")).get(kind)
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                raise TextError(f"{path}: not a readable JSON object ({error})") from None
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                return value
    return None


def check_ids(ids: np.ndarray, config: TextConfig) -> np.ndarray:
    """Token ids as int64 [B, T]. Raises TextError for a wrong shape, length or range."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise TextError(f"token ids must be integers [B, T], got {ids.dtype} {list(ids.shape)}")
    if not 1 <= ids.shape[1] <= config.max_position_embeddings:
        raise TextError(
            f"{ids.shape[1]} token ids per text; the text tower takes 1 to "
            f"{config.max_position_embeddings}"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= config.vocab_size):
        raise TextError(
            f"token ids run from {ids.min()} to {ids.max()}; the vocabulary has {config.vocab_size}"
        )
    return ids.astype(np.int64)


def pooled_position(ids: np.ndarray, eos_token_id: int) -> np.ndarray:
    """The position where each text is pooled: its first end token, int64 [B] (0 if there is none).

    An id of 2 marks an old CLIP config, from before its ids were corrected; there the largest id is the end
    token.
    """
    if eos_token_id == 2:
        return ids.argmax(-1)
    return (ids == eos_token_id).argmax(-1)
