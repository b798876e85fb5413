"""A user's mistake is one line that says what to type, never a stack trace."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend. The message is one line: the file or flag, what was wrong, what to type."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's `main`; a `UserError` becomes `error: ...` on stderr and exit status 2, Ctrl-C status 130."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status or 0)
