"""Every error that tritonsmith raises on purpose.

TritonsmithError            exit code 1
├── UsageError              wrong command line or argument; exit code 2
├── RecipeError             recipe.toml: unknown key, wrong type, impossible combination
├── SourceError             a trained model that cannot be read or converted
│   ├── MissingExtraError   the framework that reads it is not installed
│   └── ParityError         the converted model does not compute what the source computes
├── SamplesError            an .npz of samples that does not fit the model or its purpose
├── CompressionError        a model that cannot be quantized or cast as asked
├── EngineError             an engine that cannot load or run an artifact
│   └── PlanError           a TensorRT plan that cannot be built here, or does not fit
│       └── NotCompiledError  TensorRT compiles none of an order's candidates
├── RepositoryError         a model name, version, configuration or repository folder
│   └── EnsembleError       a step or tensor that does not fit the next
├── GateRefused             no candidate passed the accuracy gate; nothing was published
├── ProvisionError          the server's environment or perf_analyzer could not be set up
├── ServerError             the embedded Triton failed to start, to answer or to stop
├── ClientError             a request that was refused before or after it was sent
├── ValidationError         nothing could be compared
├── DeployError             a repository that cannot be measured or rendered for a container or a cluster
└── BenchError              perf_analyzer failed or measured nothing
"""

from __future__ import annotations

from typing import ClassVar


class TritonsmithError(Exception):
    """What is wrong, then what was found, what was expected and what to do, each where it helps."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(what)

    @property
    def reason(self) -> str:
        """What is wrong and what was found, in one line: a part of a larger message."""
        return self.what if self.found is None else f"{self.what}: {self.found}"

    def __str__(self) -> str:
        lines = [self.what]
        for label, value in (("found", self.found), ("expected", self.expected), ("to do", self.fix)):
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)


class UsageError(TritonsmithError):
    exit_code = 2


class RecipeError(TritonsmithError):
    pass


class SourceError(TritonsmithError):
    pass


class MissingExtraError(SourceError):
    """A framework is missing; `extra` is the name in `pip install 'tritonsmith[extra]'`."""

    def __init__(self, what: str, *, package: str, extra: str) -> None:
        super().__init__(
            what,
            found=f"the Python package {package!r} is not installed",
            fix=f"pip install 'tritonsmith[{extra}]'",
        )


class ParityError(SourceError):
    pass


class SamplesError(TritonsmithError):
    pass


class CompressionError(TritonsmithError):
    pass


class EngineError(TritonsmithError):
    pass


class PlanError(EngineError):
    pass


class NotCompiledError(PlanError):
    pass


class RepositoryError(TritonsmithError):
    pass


class EnsembleError(RepositoryError):
    pass


class GateRefused(TritonsmithError):  # noqa: N818 - a refusal is the gate's answer, not a fault
    pass


class DeployError(TritonsmithError):
    pass


class ProvisionError(TritonsmithError):
    pass


class ServerError(TritonsmithError):
    pass


class ClientError(TritonsmithError):
    pass


class ValidationError(TritonsmithError):
    pass


class BenchError(TritonsmithError):
    pass
