"""A repository read offline: what Triton would refuse, ignore, or answer otherwise, before it is deployed.

`run.py` asks each family of checks: `scan.py` (folders, configurations that parse), `fields.py` (the rules
of one configuration), `variants.py` (targets against the default), `ensembles.py`, `releases.py` (what a
container has), `stages.py`, `files.py`, `manifests.py`, `onnx_files.py` and `plans.py`. Nothing is run,
nothing written.
"""
