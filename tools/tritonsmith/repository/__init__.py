"""A Triton model repository: configurations, published versions, ensembles.

config.py    an artifact and a recipe's [config] table <-> config.pbtxt, through Triton's own protobuf
entry.py     a new version of a model, published atomically; what is already there
ensemble.py  an ensemble's configuration, derived from its steps and checked against them
"""
