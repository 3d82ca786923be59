"""The embedded Triton: its environment, its process, and the Python-based backends that it serves with."""

from tritonsmith.server.options import ServerOptions
from tritonsmith.server.process import Server, serve, serve_forever

__all__ = ["Server", "ServerOptions", "serve", "serve_forever"]
