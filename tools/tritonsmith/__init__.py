"""From a trained model to a verified, tuned Triton Inference Server deployment."""

__version__ = "0.1.0"
