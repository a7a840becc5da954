"""The verbs of the command line, one importable function each; each module also knows how to show its result."""
