"""The verbs of the command line, one importable function each.

Each module also has a function `show`, which prints the result.
"""
