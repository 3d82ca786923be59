"""Proof that what is served is what was trained.

The same samples go to the server and to a reference, and every output is compared:

    over        http, grpc
    as          single       one sample a request, one after the other
                batched      `max_batch_size` samples a request
                concurrent   one sample a request, many at once, so that the server mixes them
    against     source       the trained model in its own framework
                file         the published file, run in this process
                steps        an ensemble's steps, called one by one

run.py         the whole of it, and how the server is asked
references.py  what to compare with
compare.py     two arrays
report.py      what came out
"""

from tritonsmith.validate.report import Check, Mixing, ValidationReport, Worst
from tritonsmith.validate.run import validate

__all__ = ["Check", "Mixing", "ValidationReport", "Worst", "validate"]
