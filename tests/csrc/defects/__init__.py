"""Mistakes in what a kernel means, planted beside the generated ones: a list DEFECTS in <op>.py for each op.

A defect is an expression of the source that becomes another of the same type:
(what is wrong, file under csrc, find, put), where more pairs of find and put may follow: what moves is left out in one
place and put into another. ``find`` must occur once in the file; both may stand between the same ``return`` or
``name =`` and ``;``.

REPRESENTATIVES are what `make test` tries: for each build of the op's check program one mutation, from this list or
generated, that this build must notice; where there is one, a mutation that only this build notices. (file, how the key
of the mutation begins); the first one in the file counts.
"""
