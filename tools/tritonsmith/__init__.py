"""From a trained model to a verified, tuned Triton Inference Server deployment."""

import os

__version__ = "0.1.0"

# Since 1.29, ONNX Runtime for Linux reports its use, names of models among it, to its maker, unless this is
# set before its first import. Set it yourself to decide otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
