"""The verbs of the command line, one importable function each.

Each module also has a function `show`, which prints the result. What imports PyTorch is imported in
functions, when the work begins, so that the help on a verb is there at once.
"""
