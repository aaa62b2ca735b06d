"""The command line: parse, call one library function, print."""

from __future__ import annotations

import signal
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of ``deployfa``.  Exit 0 done, 1 a check failed, 2 the request cannot be carried out."""
    from deployfa.cli.app import app
    from deployfa.errors import DeployfaError

    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except DeployfaError as error:
        # one line, whatever a library below put into its message
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # the reader of our output (head, less) has seen enough
        sys.stderr.close()
        sys.exit(0)


def _stop(number: int, _: object) -> None:
    """End as Ctrl-C would: what was being written aside is removed on the way out, which a second signal must not cut
    short."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)
