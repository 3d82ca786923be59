"""TensorRT: an ONNX file to a plan for one GPU and one version, and a plan run in this process.

What decides (versions, profiles, flags, compatibility) is plain functions that need no GPU; `builder.py`,
`session.py` and `cuda.py` are the thin part that talks to the libraries. All of it needs numpy alone beside
the binding, so that it runs where nothing else can be installed.
"""
