"""One file per question, each with a main and flags; see README.md."""

import os
import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # A command is about to be imported, which takes a second or two; flags.launch handles Ctrl-C from then on.
    def _stop(*_) -> None:
        os.write(2, b"stopped by Ctrl-C\n")
        os._exit(130)

    signal.signal(signal.SIGINT, _stop)
