"""Training: an ONNX graph as a PyTorch module, and one resumable loop for every source.

Everything here needs PyTorch, so these modules are imported inside functions only.
"""
