"""Doubles numbers and reads text that is not ASCII: what breaks first in an environment that is not right.

`import ssl` fails where the stub's libpython is of another build than the interpreter.
"""

import platform
import ssl  # noqa: F401
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        number = pb_utils.get_input_tensor_by_name(request, "number").as_numpy()
        text = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
        stored = Path(__file__).with_name("text.txt").read_text()  # in the locale's encoding, on purpose
        echo = text[0].decode() + stored.strip()
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("doubled", number * 2),
                pb_utils.Tensor("echo", np.array([echo.encode()], dtype=object)),
                pb_utils.Tensor(
                    "python", np.array([platform.python_version(), np.__version__], dtype=object)
                ),
            ]
        )
