"""The one family of errors that Countermark raises on purpose.

A message says what was wrong, where, and what to do next, in one line. The command line prints that line and exits with
status 2; anything else that escapes is a bug.
"""


class CountermarkError(Exception):
    """Something the caller can put right: bad input, a damaged file, a full disk."""
