"""Text [batch, 1] in UTF-8 -> token ids, mask and types, each [batch, sequence], padded to the longest."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

MAX_TOKENS = 256  # the length that the model was trained on


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        # The stub's locale is ASCII, so the encoding is named.
        description = (folder / "tokenizer.json").read_text(encoding="utf-8")
        self.tokenizer = Tokenizer.from_str(description)
        padding = json.loads(description).get("padding") or {}
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding(
            pad_id=padding.get("pad_id", 0), pad_token=padding.get("pad_token", "[PAD]")
        )

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        texts = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1)
        try:
            encodings = self.tokenizer.encode_batch([text.decode("utf-8") for text in texts])
        except UnicodeDecodeError as error:
            message = f"input 'text' is not UTF-8: {error}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
        columns = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
        }
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.array(rows, dtype=np.int64)) for name, rows in columns.items()]
        )
