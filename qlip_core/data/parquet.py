"""Hugging Face-style parquet: a column `image` (bytes, or a struct with `bytes`), `caption` or `text`, `label`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from qlip_core.data.locations import RETRIES, fsspec_open, local_path, scheme, wait_to_retry
from qlip_core.data.samples import BROKEN_ARCHIVE, TOO_LARGE, Bad, Limits, Sample, make_sample
from qlip_core.errors import DataError

_CAPTIONS = ("caption", "text")
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class _Columns:
    image: str
    caption: str | None
    label: str | None
    # Names for the numbers in `label`, if the file has them.
    classes: tuple[str, ...]
    # If the image is a struct, only its bytes are read; its path is only a name and never opened.
    nested: bool


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files; each row group is a shard."""

    location: str
    files: tuple[str, ...]
    groups: tuple[tuple[int, int, int], ...]  # (file, row group, its first row in the file)
    columns: tuple[_Columns, ...]
    limits: Limits
    kind: str = "parquet"

    @classmethod
    def open(cls, location: str, files: Sequence[str], limits: Limits) -> ParquetSource:
        """Reads every file's footer. Raises DataError for a file that is not parquet or lacks a column."""
        groups: list[tuple[int, int, int]] = []
        columns = []
        for number, name in enumerate(files):
            try:
                with _File(name) as file:
                    columns.append(_find_columns(name, file.schema_arrow, limits.caption))
                    first = 0
                    for group in range(file.metadata.num_row_groups):
                        groups.append((number, group, first))
                        first += file.metadata.row_group(group).num_rows
            except OSError as error:
                raise DataError(f"{name}: cannot be read ({error})") from None
        if not groups:
            raise DataError(f"{location}: the parquet files hold no rows")
        return cls(location, tuple(files), tuple(groups), tuple(columns), limits)

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(f"{self.files[file]}, row group {group}" for file, group, _ in self.groups)

    def read_shard(
        self, shard: int, *, skip: int = 0, part: int = 0, parts: int = 1
    ) -> Iterator[tuple[int, Sample | Bad]]:
        """(row, sample) for the row group's rows from `skip` on whose number % parts == part."""
        number, group, first = self.groups[shard]
        name, columns = self.files[number], self.columns[number]
        image = f"{columns.image}.bytes" if columns.nested else columns.image
        wanted = [name for name in (image, columns.caption, columns.label) if name]
        stem = PurePosixPath(name).stem
        failures = 0
        while True:
            row = 0
            try:
                with _File(name) as file:
                    for batch in file.iter_batches(
                        _ROWS_AT_ONCE, row_groups=[group], columns=wanted, use_threads=False
                    ):
                        for offset in range(batch.num_rows):
                            if row >= skip and row % parts == part:
                                key = f"{stem}-{first + row:08d}"
                                yield row, self._sample(batch, offset, columns, key, name)
                                skip, failures = row + 1, 0
                            row += 1
                return
            except (OSError, ValueError) as error:  # what pyarrow raises derives from these
                if isinstance(error, DataError):
                    raise
                # May be a broken connection: retry, without rereading earlier rows. pyarrow raises the same for
                # damaged pages, which still fail at the last attempt.
                failures += 1
                if isinstance(error, OSError) and scheme(name) and failures <= RETRIES:
                    wait_to_retry(name, failures, error)
                    continue
                if row >= skip and row % parts == part:
                    key = f"{stem}-{first + row:08d}"
                    yield row, Bad(key, name, BROKEN_ARCHIVE, str(error).split("\n", 1)[0])
                return

    def _sample(self, batch: Any, row: int, columns: _Columns, key: str, name: str) -> Sample | Bad:
        image = batch.column(columns.image)[row]
        if columns.nested and image.is_valid:
            image = image["bytes"]
        caption = batch.column(columns.caption)[row] if columns.caption else None
        for value, limit in (
            (image, self.limits.image_bytes),
            (caption, self.limits.text_bytes),
        ):
            size = value.as_buffer().size if value is not None and value.is_valid else 0
            if size > limit:
                return Bad(key, name, TOO_LARGE, f"a value of {size} bytes, over {limit}")
        return make_sample(
            key,
            name,
            image.as_py(),
            caption.as_py() if caption is not None else None,
            None,
            needs_caption=self.limits.caption,
            label=_label(batch, row, columns),
        )


class _File:
    """An open ParquetFile, closed with the file below it."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet as pq
        except ImportError:
            raise DataError(f"{self._name}: needs pyarrow; pip install 'qlip[data]'") from None
        source: Any = str(local_path(self._name))
        if scheme(self._name):
            source = fsspec_open(self._name)
        try:
            self._file = pq.ParquetFile(source)
        except (OSError, pyarrow.ArrowException) as error:
            text = str(error).split("\n", 1)[0]
            raise DataError(f"{self._name}: not a readable parquet file ({text})") from None
        return self._file

    def __exit__(self, *error: object) -> None:
        self._file.close(force=True)


def _label(batch: Any, row: int, columns: _Columns) -> str | None:
    value = batch.column(columns.label)[row].as_py() if columns.label else None
    if value is None:
        return None
    if isinstance(value, int) and 0 <= value < len(columns.classes):
        return columns.classes[value]
    return str(value)


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names that Hugging Face's `datasets` stores for a ClassLabel; empty if there are none."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        names = noted["info"]["features"][label]["names"]
        return tuple(str(name) for name in names)
    except (KeyError, TypeError, ValueError):
        return ()


def _find_columns(name: str, schema: Any, needs_caption: bool) -> _Columns:
    import pyarrow.types as kinds

    have = ", ".join(schema.names) or "none"
    if "image" not in schema.names:
        raise DataError(f"{name}: no column `image`; columns: {have}")
    caption = next((c for c in _CAPTIONS if c in schema.names), None)
    if caption is None and needs_caption:
        raise DataError(f"{name}: no column `caption` or `text`; columns: {have}")
    kind = schema.field("image").type
    nested = kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0
    inner = kind.field("bytes").type if nested else kind
    if not (kinds.is_binary(inner) or kinds.is_large_binary(inner)):
        raise DataError(f"{name}: column `image` is {kind}; expected bytes or a struct with bytes")

    def is_text(kind: Any) -> bool:
        return kinds.is_string(kind) or kinds.is_large_string(kind)

    text = schema.field(caption).type if caption else None
    if text is not None and not is_text(text):
        raise DataError(f"{name}: column `{caption}` is {text}; expected strings")
    label = "label" if "label" in schema.names else None
    if label and not (
        kinds.is_integer(schema.field(label).type) or is_text(schema.field(label).type)
    ):
        label = None
    return _Columns("image", caption, label, _class_names(schema, label) if label else (), nested)
