"""Errors for users: one line that says what to do instead of a stack trace, and how to resume after an interruption."""

import os
import sys
from collections.abc import Callable

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same again later


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: the file or flag, what is wrong, what to do."""


class Told(UserError):
    """A mistake that another process reports."""


class Interrupted(Exception):
    """Stopped by SIGTERM or Ctrl-C with everything saved. The message is one line with the command that resumes."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: status 2 and `error: ...` after a `UserError`, 75 after `Interrupted`.

    Ctrl-C with nothing to save gives status 130. File errors (no permission, disk full), a lack of memory and a killed
    worker process also give one line and status 2.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # under torchrun every process ends with it; one line will do
            print(stop, file=sys.stderr)
        status = INTERRUPTED
    except UserError as error:
        if not isinstance(error, Told):
            print(f"error: {error}", file=sys.stderr)
        status = 2
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported for this
            print("error: out of GPU memory; try a lower --batch_size or --cache ram", file=sys.stderr)
        elif "DefaultCPUAllocator" in str(error):
            print("error: out of memory; try --cache none or a lower --batch_size", file=sys.stderr)
        # PyTorch raises it out of a signal handler, wherever the program happens to be.
        elif "DataLoader worker" in str(error):
            print("error: --num_workers: a process that reads clips was killed, by a lack of memory or by hand; "
                  "go on with --resume, with fewer workers if it happens again", file=sys.stderr)  # fmt: skip
        else:
            raise
        status = 2
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise  # not about a file: show the stack trace
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        status = 2
    except MemoryError as error:
        reason = " ".join(str(error).split()) or "no more memory"
        print(f"error: out of memory ({reason}); try --cache none or a lower --batch_size", file=sys.stderr)
        status = 2
    sys.exit(status or 0)
