"""The command `countermark`, and `python -m countermark`."""

import contextlib
import os
import sys


def main() -> int:
    """Run the command line, and end with an error status whatever fails.

    This covers a failure before the command line runs, or while it reports an error. An import that
    fails would otherwise end with Python's status 1, which means "no evidence" or "dismissed".
    """
    try:
        from countermark.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        # The streams may be what failed, or closed.
        with contextlib.suppress(OSError):
            os.write(
                2,
                f"countermark: it cannot be started or ended ({type(error).__name__}: "
                f"{str(error)!a}); install it again\n".encode(),
            )
        return 2
    finally:
        _let_go(sys.stdout)
        _let_go(sys.stderr)


def _let_go(stream: object) -> None:
    """Let a stream drop what it could not write.

    Python would otherwise try again as it exits, and end with status 120.
    """
    try:
        stream.flush()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):  # there is none, it is full, it is closed
        with contextlib.suppress(AttributeError, OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
