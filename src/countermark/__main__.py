"""The command `countermark`, and `python -m countermark`."""

import contextlib
import os
import sys


def main() -> int:
    """Run the command line; what fails before it runs, or while it says what failed, ends as an error as well.

    Without this an import that fails would end with Python's status 1, which means "no evidence" or "dismissed".
    """
    try:
        from countermark.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        # The streams may be what failed, or closed.
        with contextlib.suppress(OSError):
            os.write(2, f"countermark: it cannot be started or ended ({type(error).__name__}: {str(error)!a}); install it again\n".encode())
        return 2


if __name__ == "__main__":
    sys.exit(main())
