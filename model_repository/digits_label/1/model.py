"""Probabilities [batch, 10] -> the label of the largest [batch, 1] and its probability [batch, 1]."""

import numpy as np
import triton_python_backend_utils as pb_utils

LABELS = np.array([str(digit).encode() for digit in range(10)], dtype=np.object_)


class TritonPythonModel:
    def execute(self, requests):
        return [answer(request) for request in requests]


def answer(request):
    probabilities = pb_utils.get_input_tensor_by_name(request, "probabilities").as_numpy()
    label = LABELS[probabilities.argmax(axis=1)][:, None]
    confidence = probabilities.max(axis=1, keepdims=True).astype(np.float32)
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor("label", label), pb_utils.Tensor("confidence", confidence)]
    )
