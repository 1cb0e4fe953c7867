"""Output for people: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from rich.table import Table

_WIDE = 10_000  # columns if the output is not a terminal, so that nothing is cut
_PATIENCE = 2.0  # seconds before a progress bar appears
_BAR = 36

# A closed stream (`>&-`) is None, and the next file opened would get its number.
if sys.stdout is None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
if sys.stderr is None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


# -- stdout ------------------------------------------------------------------------------------


def print_json(document: Any) -> None:
    """One JSON document, the only thing on stdout."""
    # Characters that a terminal cannot show are escaped as in JSON.
    ascii_only = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
    print(json.dumps(document, indent=2, ensure_ascii=ascii_only, allow_nan=False))


def print_line(text: str) -> None:
    print(printable(text))


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str], *, indent: int = 0) -> None:
    """Columns under a header; the first is text and is cut if the terminal is narrow, the others are aligned
    right."""
    table = _table()
    for i, title in enumerate(header):
        column = [title, *(row[i] for row in rows)]
        table.add_column(
            title,
            justify="right" if i else "left",
            no_wrap=True,
            overflow="ellipsis",
            header_style="bold",
            min_width=max(map(_width, column)) if i else None,
        )
    table.show_header = True
    for row in rows:
        table.add_row(*map(_plain, row))
    _print(table, indent)


def print_facts(facts: Sequence[tuple[str, str]], *, indent: int = 0) -> None:
    """Name and value, line by line; long values wrap under themselves."""
    table = _table()
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, _plain(value))
    _print(table, indent)


def print_bars(rows: Sequence[tuple[str, float]]) -> None:
    """A bar chart of shares between 0 and 1; the first row, the largest, stands out."""
    columns = _stdout().width
    table = _table()
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=columns // 2)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True, min_width=len("100.0 %"))
    longest = max((_width(label) for label, _ in rows), default=0)
    room = columns - 14 - min(longest, columns // 2)
    width = min(_BAR, max(4, room))
    for i, (label, share) in enumerate(rows):
        style = "bold green" if i == 0 else "cyan"
        table.add_row(_plain(label), _bar(share, width, style), _plain(f"{100 * share:.1f} %"))
    _print(table, 2)


def _bar(share: float, width: int, style: str) -> Any:
    from rich.text import Text

    try:
        "█▏▎▍▌▋▊▉".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        bar = "#" * round(share * width)
    else:
        whole, eighths = divmod(round(share * width * 8), 8)
        bar = "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()
    return Text(bar.ljust(width), style=style)


def _table() -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)


def _print(table: Table, indent: int) -> None:
    from rich.padding import Padding

    console = _stdout()
    with console.capture() as capture:
        console.print(Padding(table, (0, 0, 0, indent), expand=False))
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _stdout() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(printable(text))


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(printable(text))


def print_picture(picture: Image.Image) -> None:
    """A picture in the terminal's colours, two pixels a character, as wide as fits (80 at most)."""
    # Apple's Terminal shows 24-bit colours in new versions only, and anything else in their place in older ones.
    few = os.environ.get("TERM_PROGRAM") == "Apple_Terminal" and not os.environ.get("COLORTERM")
    columns = min(80, _stdout().width, picture.width)
    lines = max(1, round(picture.height * columns / picture.width / 2))
    small = picture.convert("RGB").resize((columns, 2 * lines))
    pixels = small.tobytes()

    def colour(x: int, y: int) -> str:
        at = 3 * (y * columns + x)
        values = pixels[at : at + 3]
        if few:  # of the 256 colours, the cube with the levels 0, 95, 135, 175, 215 and 255
            red, green, blue = (0 if v < 48 else 1 if v < 115 else (v - 35) // 40 for v in values)
            return f"5;{16 + 36 * red + 6 * green + blue}"
        return f"2;{values[0]};{values[1]};{values[2]}"

    for y in range(0, 2 * lines, 2):
        cells = (f"\x1b[38;{colour(x, y)};48;{colour(x, y + 1)}m▀" for x in range(columns))
        print("".join(cells) + "\x1b[0m")


# -- stderr ------------------------------------------------------------------------------------


def note(text: str) -> None:
    """A message that is not a result."""
    _to_stderr(printable(text))


def print_error(text: str) -> None:
    """`error: what, where, what to do`, in one line."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    label = "\x1b[1;31merror:\x1b[0m" if colour else "error:"
    _to_stderr(f"{label} {printable(text)}")


def _to_stderr(line: str) -> None:
    """Write to stderr. If that fails, the work still goes on."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  Python flushes it again at exit


def printable(text: str) -> str:
    """`text` in one line, with line ends and control characters (of file names) made visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields a function that reports items done; `total` is None if their number is unknown. A bar appears on
    stderr, if that is a terminal, after two seconds, and disappears at the end."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total)
    timer = threading.Timer(_PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda count: bar.advance(task, count)
    finally:
        timer.cancel()
        timer.join()  # so that the bar cannot start after it was stopped
        if bar.live.is_started:
            bar.stop()


def size_text(count: int) -> str:
    """Bytes for people: 896 bytes, 3.58 kB, 957.6 MB."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{value:.4g} {unit}"


def count_text(count: int, noun: str) -> str:
    """1 image, 12 images."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
