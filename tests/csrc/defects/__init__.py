"""Mistakes in what a kernel means, planted beside the generated ones: a list DEFECTS in <op>.py for each op.

A defect is an expression of the source that becomes another of the same type:
(what is wrong, file under csrc, find, put). ``find`` must occur once in the file; both may stand between the same
``return`` or ``name =`` and ``;``.

REPRESENTATIVES are what `make test` tries: for each build of the op's check program one mutation, from this list or
a generated one, that this build must notice. (file, how ``str`` of it begins behind the line); the first one counts.
"""
