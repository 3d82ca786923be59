"""A light client of a Triton server: numpy and tritonclient are all that it needs.

from tritonsmith.client import Client

with Client("grpc://127.0.0.1:8001") as client:
    digits = client.model("digits")
    print(digits.signature)
    probabilities = digits(image=images)["probabilities"]
"""

from tritonsmith.client.clients import AsyncClient, AsyncModel, Client, Model
from tritonsmith.client.signature import Signature, Tensor
from tritonsmith.errors import ClientError

__all__ = ["AsyncClient", "AsyncModel", "Client", "ClientError", "Model", "Signature", "Tensor"]
