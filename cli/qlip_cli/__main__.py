"""The entry point of `qlip` and `python -m qlip_cli`; torchrun starts the latter on every device."""

import signal
import sys


def main() -> int:
    """`qlip_cli.main.main`. While it is imported, Ctrl-C simply ends the process; by default Python would show
    a traceback of imports."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # nobody has changed it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qlip_cli import main as command

    signal.signal(signal.SIGINT, before)
    return command.main()


if __name__ == "__main__":
    sys.exit(main())
