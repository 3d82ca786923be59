"""A tiny model with a plan order, and tools whose "plan" is the ONNX file itself, run by ONNX Runtime.

scores = features @ weight + bias, of `onnx_models.linear_weights`, as FP32, FP16 and INT8 files.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_models import linear_model, linear_weights, model_from_text, write_model
from publishing import artifact_of, manifest_of, tensor
from tritonsmith.artifact import Target, TensorSpec, sha256_of
from tritonsmith.engines import Arrays, Session, open_session
from tritonsmith.engines.tensorrt.facts import Device, PlanFacts
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import PlanError
from tritonsmith.repository.config import config_from_artifact
from tritonsmith.repository.entry import Entry, publish
from tritonsmith.targets.choose import PlanTools
from tritonsmith.targets.config import config_for_target
from tritonsmith.targets.order import PlanCandidate, PlanOrder
from tritonsmith.targets.order_file import order_name, signed, text_from_order
from tritonsmith.targets.request import TargetRequest

H100 = Device(gpu="H100", compute_capability="9.0", driver="580.1", memory_bytes=80 << 30)
INPUTS = (tensor("features", "float32", "batch", 4),)
OUTPUTS = (tensor("scores", "float32", "batch", 3),)
PROFILE = Profile(axes={"batch": AxisRange(minimum=1, best=4, maximum=8)})


def fp16_model() -> onnx.ModelProto:
    """The linear model computed in FP16; FP32 in and out."""
    weights = {name: array.astype(np.float16) for name, array in linear_weights().items()}
    return model_from_text(
        "half (float[N, 4] features) => (float[N, 3] scores) {"
        " narrow = Cast <to = 10> (features)"
        " product = MatMul(narrow, weight)"
        " sum = Add(product, bias)"
        " scores = Cast <to = 1> (sum) }",
        weights,
    )


def int8_model() -> onnx.ModelProto:
    """The linear model with input and weight on grids of INT8."""
    weights = linear_weights()
    step = np.abs(weights["weight"]).max() / 127
    return model_from_text(
        "grid (float[N, 4] features) => (float[N, 3] scores) {"
        " q = QuantizeLinear(features, x_step, zero)"
        " x = DequantizeLinear(q, x_step, zero)"
        " w = DequantizeLinear(weight, w_step, zero)"
        " product = MatMul(x, w)"
        " scores = Add(product, bias) }",
        {
            "weight": np.round(weights["weight"] / step).astype(np.int8),
            "bias": weights["bias"],
            "x_step": np.float32(1 / 127),
            "w_step": np.float32(step),
            "zero": np.int8(0),
        },
    )


MODELS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "fp32": linear_model,
    "fp16": fp16_model,
    "int8": int8_model,
}


def write_order(
    folder: Path, precisions: Sequence[str] = ("fp32",), *, target: str = "gpu", **changes: Any
) -> PlanOrder:
    """The candidates and their order in `folder`, as a deferred build leaves them."""
    candidates = []
    for precision in precisions:
        path = write_model(folder / f"{target}.{precision}.onnx", MODELS[precision]())
        candidates.append(PlanCandidate(file=path.name, sha256=sha256_of(path), precision=precision))
    order = PlanOrder(
        target=target,
        candidates=tuple(candidates),
        inputs=INPUTS,
        outputs=OUTPUTS,
        max_batch_size=8,
        plan=PlanOptions(profiles=(PROFILE,), tf32=False),
        precision="auto",
        allow_slow_int8=False,
        fallback=None,
        fingerprint="",
    )
    order = signed(dataclasses.replace(order, **changes))
    (folder / order_name(target)).write_text(text_from_order(order))
    return order


def publish_order(
    repository: Path,
    work: Path,
    precisions: Sequence[str] = ("fp32",),
    *,
    name: str = "linear",
    **changes: Any,
) -> Entry:
    """The linear model published with the target `gpu`, whose plans are still to be built."""
    work.mkdir()
    write_model(work / "model.onnx", linear_model())
    order = write_order(work, precisions, **changes)
    artifact = artifact_of(INPUTS, OUTPUTS)
    config = config_from_artifact(artifact, name=name, backend="onnxruntime", max_batch_size=8)
    request = TargetRequest(name=order.target, backend="tensorrt", plan=order.plan)
    own = tuple(sorted(path.name for path in work.iterdir() if path.name.startswith(f"{order.target}.")))
    target = Target(
        name=order.target, backend="tensorrt", precision=None, files=own, order=order_name(order.target)
    )
    manifest = dataclasses.replace(
        manifest_of(artifact, order.fingerprint), backend="onnxruntime", targets=(target,)
    )
    return publish(
        work,
        config,
        repository,
        manifest=manifest,
        targets={order.target: config_for_target(config, request, inputs=INPUTS, plan=order.plan)},
    )


def corrupt(path: Path) -> None:
    """Turn the sign of one weight of an ONNX file."""
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0] *= -1
    weight.CopyFrom(onnx.numpy_helper.from_array(array, "weight"))
    path.write_bytes(model.SerializeToString())


@dataclasses.dataclass
class OnnxTools:
    """What the "GPU" of a test does: which candidates fail or come out wrong, and how long a run takes."""

    device: Device = H100
    version: str = "10.16.1.11"
    unavailable: str | None = None
    fails: tuple[str, ...] = ()  # precisions that do not compile
    wrong: tuple[str, ...] = ()  # precisions whose plan has a wrong weight
    milliseconds: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"fp32": 2.0, "fp16": 1.0})
    stripped: bool = False
    compiled: list[str] = dataclasses.field(default_factory=list)

    def tools(self) -> PlanTools:
        return PlanTools(
            why_unavailable=lambda: self.unavailable,
            version=lambda: self.version,
            device=lambda: self.device,
            compile=self.compile,
            open=self.open,
            refit=self.refit,
            time=self.time,
        )

    def compile(
        self,
        onnx: Path,
        out: Path,
        *,
        inputs: tuple[TensorSpec, ...],
        options: PlanOptions,
        precision: str,
        timing_cache: Path | None,
        say: Callable[[str], None],
    ) -> PlanFacts:
        self.compiled.append(onnx.name)
        if precision in self.fails:
            raise PlanError(f"TensorRT refuses {onnx.name}", found="no implementation of node 7")
        shutil.copyfile(onnx, out)
        if precision in self.wrong:
            corrupt(out)
        return PlanFacts(
            file=out.name,
            sha256=sha256_of(out),
            size_bytes=out.stat().st_size,
            source=onnx.name,
            source_sha256=sha256_of(onnx),
            precision=precision,
            tensorrt=self.version,
            device=self.device,
            version_compatible=options.version_compatible,
            hardware_compatibility=options.hardware_compatibility,
            stripped=self.stripped,
            duration_s=0.1,
            measured={"layers": 3},
        )

    def open(self, plan: Path, *, profile: int, onnx: Path) -> AbstractContextManager[Session]:
        return nullcontext(NamedSession(plan.name.split(".")[0], open_session(plan)))

    def refit(self, plan: Path, onnx: Path, out: Path) -> None:
        out.write_bytes(plan.read_bytes() + onnx.read_bytes())

    def time(self, sessions: Sequence[Session], inputs: Arrays) -> NDArray[Any]:
        """Rounds that differ by 1 % and no more."""
        jitter = 1 + np.linspace(-0.01, 0.01, 21)
        names = [session.precision for session in sessions if isinstance(session, NamedSession)]
        return np.stack([jitter * self.milliseconds[name] / 1e3 for name in names], axis=1)


@dataclasses.dataclass
class NamedSession:
    precision: str
    session: Session

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        return self.session.run(inputs)
