"""Where `qlip` and `python -m qlip_cli` begin; torchrun starts the latter so on every device."""

import signal
import sys


def main() -> int:
    """`qlip_cli.main.main`. Importing it takes a moment, in which Ctrl-C just ends the process: Python's own
    way shows a traceback of imports."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # nobody's choice yet
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qlip_cli import main as command

    signal.signal(signal.SIGINT, before)
    return command.main()


if __name__ == "__main__":
    sys.exit(main())
