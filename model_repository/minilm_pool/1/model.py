"""Mean over the tokens that the mask keeps, then L2 normalisation.

last_hidden_state [batch, sequence, 384], attention_mask [batch, sequence] -> embedding [batch, 384]
"""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [answer(request) for request in requests]


def answer(request):
    vectors = pb_utils.get_input_tensor_by_name(request, "last_hidden_state").as_numpy()
    mask = pb_utils.get_input_tensor_by_name(request, "attention_mask").as_numpy()
    weights = mask[..., None].astype(np.float32)
    mean = (vectors * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1.0)
    norm = np.linalg.norm(mean, axis=1, keepdims=True)
    embedding = (mean / np.maximum(norm, 1e-12)).astype(np.float32)
    return pb_utils.InferenceResponse([pb_utils.Tensor("embedding", embedding)])
