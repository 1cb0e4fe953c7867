"""The `qlip` command: the list of commands, and the handling of errors.

A command is a function in a file of its own and one line here; a group of commands is a
`typer.Typer` in a file of its own and one `add_typer` line.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from qlip_cli import data, evaluate, train
from qlip_cli.classify import classify
from qlip_cli.decode import decode
from qlip_cli.doctor import doctor
from qlip_cli.embed import embed
from qlip_cli.encode import encode
from qlip_cli.evaluate_generate import evaluate_generate
from qlip_cli.generate import generate
from qlip_cli.info import info
from qlip_cli.reconstruct import reconstruct
from qlip_cli.terminal import note, print_error
from qlip_cli.tokenize import tokenize

USER_ERROR, BUG, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 70, 130, 141, 143

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: qlip encode photo.png && qlip decode photo.qlip",
)

app.command(epilog="Example: qlip encode photos/ -o photos.qlip")(encode)
app.command(epilog="Example: qlip decode photos.qlip -o again/")(decode)
app.command(epilog="Example: qlip reconstruct a.png b.jpg")(reconstruct)
app.command(epilog='Example: qlip classify a.png -l "a cat,a dog"')(classify)
app.command(epilog="Example: qlip embed photos/ -o photos.safetensors")(embed)
app.command(epilog='Example: qlip generate "a cat" --seed 3')(generate)
app.command(epilog="Example: qlip info photos.qlip")(info)
app.command(epilog="Example: qlip doctor --backend mlx")(doctor)
app.command(epilog="Example: qlip tokenize 'shards/{00000..00099}.tar' -o tokens")(tokenize)
evaluate.app.command("generate", epilog="Example: qlip eval generate --grid drawn.png")(
    evaluate_generate
)
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="eval")
app.add_typer(data.app, name="data")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"qlip {version('qlip')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from. May follow any command.")
    ] = False,
) -> None:
    """QLIP: one visual tokenizer that reconstructs images and understands them."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0; 1 if some inputs failed; 2 for errors that the
    user can fix; 70 for a bug; 130 when interrupted; 141 if stdout is closed; 143 after SIGTERM."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _make_lenient(sys.stdout)
    _make_lenient(sys.stderr)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]
    try:
        with _terminable(arguments):
            code = _run(arguments)
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout again at exit, which must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except Terminated:
        note("terminated")
        return TERMINATED
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        text, code = explain(error)
        print_error(text)
        return code


class Terminated(BaseException):
    """Raised on SIGTERM, so that everything unwinds as after Ctrl-C and temporary files are removed."""


@contextmanager
def _terminable(arguments: list[str]) -> Iterator[None]:
    """SIGTERM raises Terminated, once. A training run handles it itself and writes a checkpoint."""
    ours = threading.current_thread() is threading.main_thread() and arguments[0] != "train"
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="qlip", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except SystemExit as stop:  # how typer exits when a pipe breaks
        raise BrokenPipeError from stop
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def explain(error: Exception) -> tuple[str, int]:
    """(one-line message for the user, exit status)."""
    usage = typer.BadParameter.__mro__[1]  # UsageError of the click that typer includes
    if isinstance(error, usage):
        context = getattr(error, "ctx", None)
        # Errors from the option parser have no context.
        where = f"`{context.command_path} --help`" if context else "the command's --help"
        text = error.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
        stop = "" if text.endswith("?") else ";"
        return f"{text[:1].lower()}{text[1:]}{stop} see {where}", USER_ERROR
    if _is_out_of_memory(error):
        return "out of memory: lower --batch-size, or use a smaller model", USER_ERROR
    if isinstance(error, OSError):
        reason = (error.strerror or str(error)).lower()
        return (f"{error.filename}: {reason}" if error.filename else reason), USER_ERROR
    # All of qlip_core.errors, and the core's errors about arguments.
    if isinstance(error, ValueError):
        # A training run stopped by a signal has its own exit code, as in a shell.
        return str(error), getattr(error, "exit_code", USER_ERROR)
    kind = type(error).__name__
    return f"internal: {kind}: {error}: this is a bug; --debug shows where it happened", BUG


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, in the words of PyTorch (the first) or of MLX."""
    words = (
        "out of memory",
        "insufficient memory",
        "unable to allocate",
        "maximum allowed buffer size",
    )
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in text for phrase in words)
    )


def _make_lenient(stream: object) -> None:
    """File names may not be valid Unicode, and terminals may not show all of it; neither must end a run."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
