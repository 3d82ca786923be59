"""Which step writes each tensor of an ensemble, which steps read it, and whether they agree.

The rules are those of Triton core's `src/ensemble_scheduler/ensemble_utils.cc` and BuildEnsembleGraph in
`src/model_config_utils.cc`; the messages name the step, the tensor and the other end of the connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tritonclient.grpc import model_config_pb2

from tritonsmith.errors import EnsembleError
from tritonsmith.repository.table import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleStep:
    """One model of an ensemble; `inputs` and `outputs` map its tensors to the ensemble's."""

    model: str
    inputs: Mapping[str, str]  # the step's input -> the ensemble's tensor
    outputs: Mapping[str, str]  # the step's output -> the ensemble's tensor
    version: int | None = None  # None: the newest that the model's version policy serves


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """An end of a connection: a step's input or output."""

    step: int
    model: str
    tensor: str
    data_type: int
    dims: tuple[int, ...]  # without the batch axis, as in config.pbtxt
    batched: bool

    @property
    def full_dims(self) -> tuple[int, ...]:
        return (-1, *self.dims) if self.batched else self.dims

    def __str__(self) -> str:
        kind = model_config_pb2.DataType.Name(self.data_type).removeprefix("TYPE_")
        axes = ", ".join(["batch"] * self.batched + [str(dim) for dim in self.dims])
        return f"step {self.step + 1} ({self.model}) {self.tensor!r}: {kind} [{axes}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """An ensemble's tensors: who writes each, who reads each, in the order of the steps."""

    writers: Mapping[str, Port]
    readers: Mapping[str, tuple[Port, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def wire_steps(
    name: str,
    steps: Sequence[EnsembleStep],
    configs: Sequence[model_config_pb2.ModelConfig],
    inputs: tuple[str, ...] | None,
    outputs: tuple[str, ...] | None,
) -> Wiring:
    """Connect the steps, whose models are described by `configs`, and check every connection.

    Raises:
        EnsembleError: names the step and the tensor, and says why.
    """
    writers: dict[str, Port] = {}
    readers: dict[str, list[Port]] = {}
    for index, (step, config) in enumerate(zip(steps, configs, strict=True)):
        _check_step(name, index, step, config)
        for tensor, connected in step.inputs.items():
            readers.setdefault(connected, []).append(_port(index, config, config.input, tensor))
        for tensor, connected in step.outputs.items():
            port = _port(index, config, config.output, tensor)
            if connected in writers:
                raise EnsembleError(
                    f"ensemble {name!r}: tensor {connected!r} is written twice",
                    found=f"{writers[connected]}, and {port}",
                    fix="give one of them another name",
                )
            writers[connected] = port
    own_inputs = _own_inputs(name, writers, readers, inputs)
    _check_order(name, steps, writers, readers)
    own_outputs = _own_outputs(name, writers, readers, own_inputs, outputs)
    wiring = Wiring(
        writers=writers,
        readers={tensor: tuple(ports) for tensor, ports in readers.items()},
        inputs=own_inputs,
        outputs=own_outputs,
    )
    for tensor in wiring.readers:
        _check_connection(name, tensor, wiring)
    return wiring


def dims_agree(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two shapes are one, where -1 matches any length."""
    return len(first) == len(second) and all(
        a == b or -1 in (a, b) for a, b in zip(first, second, strict=True)
    )


def _check_step(name: str, index: int, step: EnsembleStep, config: model_config_pb2.ModelConfig) -> None:
    """The step names tensors that its model has, and every input that the model needs."""
    place = f"ensemble {name!r}: step {index + 1} ({step.model})"
    for kind, connected, tensors in (
        ("input", step.inputs, config.input),
        ("output", step.outputs, config.output),
    ):
        names = [tensor.name for tensor in tensors]
        if not names:
            raise EnsembleError(
                f"{place} declares no {kind}s in its config.pbtxt",
                fix="write them there; what the server alone knows cannot be checked",
            )
        for tensor in connected:
            if tensor not in names:
                raise EnsembleError(
                    f"{place} has no {kind} {tensor!r}",
                    expected=f"one of {', '.join(names)}",
                    fix=_did_you_mean(tensor, names),
                )
        if not connected:
            raise EnsembleError(f"{place} has no {kind}s connected", expected=f"some of {', '.join(names)}")
    needed = [tensor.name for tensor in config.input if not tensor.optional]
    if missing := [tensor for tensor in needed if tensor not in step.inputs]:
        raise EnsembleError(
            f"{place}: input {', '.join(map(repr, missing))} is not connected",
            found=f"connected: {', '.join(step.inputs)}",
            expected=f"all of {', '.join(needed)}",
            fix=f'add {missing[0]} = "<tensor>" to the step\'s inputs',
        )


def _own_inputs(
    name: str,
    writers: Mapping[str, Port],
    readers: Mapping[str, list[Port]],
    declared: tuple[str, ...] | None,
) -> tuple[str, ...]:
    """The tensors that no step writes; they are the ensemble's inputs if it says so, or says nothing."""
    unwritten = [tensor for tensor in readers if tensor not in writers]
    unread = [tensor for tensor in writers if tensor not in readers]
    for tensor in unwritten:
        reader = readers[tensor][0]
        near = [other for other in unread if writers[other].step < reader.step]
        guess = nearest(tensor, near)
        if (declared is None and guess is not None) or (declared is not None and tensor not in declared):
            raise EnsembleError(
                f"ensemble {name!r}: tensor {tensor!r} is written by no step",
                found=f"read by {reader}",
                expected=f"a tensor of another step ({', '.join(writers)}) or an input of the ensemble",
                fix=_did_you_mean(tensor, near) or "name it in the ensemble's inputs if it is one",
            )
    for tensor in declared or ():
        if tensor in writers:
            raise EnsembleError(
                f"ensemble {name!r}: input {tensor!r} is also written by a step", found=str(writers[tensor])
            )
        if tensor not in readers:
            raise EnsembleError(
                f"ensemble {name!r}: input {tensor!r} is read by no step",
                expected=f"some of {', '.join(unwritten)}",
                fix=_did_you_mean(tensor, unwritten),
            )
    if not unwritten:
        raise EnsembleError(
            f"ensemble {name!r} has no input of its own",
            found="every tensor is written by a step",
            expected="a first step that reads a tensor which no step writes",
        )
    return declared if declared is not None else tuple(unwritten)


def _own_outputs(
    name: str,
    writers: Mapping[str, Port],
    readers: Mapping[str, list[Port]],
    inputs: tuple[str, ...],
    declared: tuple[str, ...] | None,
) -> tuple[str, ...]:
    unread = [tensor for tensor in writers if tensor not in readers]
    if declared is None:
        if not unread:
            raise EnsembleError(
                f"ensemble {name!r} has no output of its own",
                found="every tensor is read by a step",
                fix="name the tensors to answer in the ensemble's outputs",
            )
        return tuple(unread)
    for tensor in declared:
        if tensor not in writers:
            what = "is one of its inputs" if tensor in inputs else "is written by no step"
            raise EnsembleError(
                f"ensemble {name!r}: output {tensor!r} {what}",
                expected=f"some of {', '.join(writers)}",
                fix=_did_you_mean(tensor, list(writers)),
            )
    for tensor in unread:
        if tensor not in declared:
            raise EnsembleError(
                f"ensemble {name!r}: tensor {tensor!r} is never used",
                found=f"written by {writers[tensor]}",
                expected="a step that reads it, or its name among the ensemble's outputs",
                fix="leave it out of the step's outputs if nobody needs it",
            )
    return declared


def _check_order(
    name: str,
    steps: Sequence[EnsembleStep],
    writers: Mapping[str, Port],
    readers: Mapping[str, list[Port]],
) -> None:
    for tensor, ports in readers.items():
        writer = writers.get(tensor)
        for port in ports:
            if writer is None or writer.step < port.step:
                continue
            if _depends_on(writer.step, port.step, steps, writers):
                raise EnsembleError(
                    f"ensemble {name!r}: the steps form a cycle at tensor {tensor!r}",
                    found=f"read by {port}, written by {writer}, which waits for it",
                )
            raise EnsembleError(
                f"ensemble {name!r}: tensor {tensor!r} is read before it is written",
                found=f"read by {port}, written by {writer}",
                fix=f"put step {writer.step + 1} ({writer.model}) before step {port.step + 1} ({port.model})",
            )


def _depends_on(step: int, other: int, steps: Sequence[EnsembleStep], writers: Mapping[str, Port]) -> bool:
    """Whether `step` needs, directly or through others, what `other` writes."""
    seen: set[int] = set()
    waiting = [step]
    while waiting:
        current = waiting.pop()
        if current == other:
            return True
        if current not in seen:
            seen.add(current)
            waiting += [
                writers[tensor].step for tensor in steps[current].inputs.values() if tensor in writers
            ]
    return False


def _check_connection(name: str, tensor: str, wiring: Wiring) -> None:
    """Everyone at a tensor agrees on its data type and shape."""
    first, *others = _ends(tensor, wiring)
    for other in others:
        if first.data_type != other.data_type:
            raise EnsembleError(
                f"ensemble {name!r}: the ends of tensor {tensor!r} have different data types",
                found=f"{first}, and {other}",
                fix="convert it in a step between them, or change the Python stage's config.pbtxt",
            )
        if not (dims_agree(first.full_dims, other.full_dims) or _agree_one_by_one(first, other)):
            raise EnsembleError(
                f"ensemble {name!r}: the ends of tensor {tensor!r} have different shapes",
                found=f"{first}, and {other}",
                fix=_shape_advice(first, other),
            )


def _ends(tensor: str, wiring: Wiring) -> Iterable[Port]:
    if tensor in wiring.writers:
        yield wiring.writers[tensor]
    yield from wiring.readers.get(tensor, ())


def _agree_one_by_one(first: Port, other: Port) -> bool:
    """Triton adds or drops a batch axis of 1 between a model that batches and one that does not."""
    return first.batched != other.batched and dims_agree(first.dims, other.dims)


def _shape_advice(first: Port, other: Port) -> str | None:
    if first.batched == other.batched:
        return None
    batched, single = (first, other) if first.batched else (other, first)
    return (
        f"{batched.model} batches: its dims leave the batch axis out. {single.model} has max_batch_size 0: "
        "its dims are the whole shape. Give it a max_batch_size, or a first axis of -1"
    )


def _port(
    index: int,
    config: model_config_pb2.ModelConfig,
    tensors: Iterable[model_config_pb2.ModelInput | model_config_pb2.ModelOutput],
    name: str,
) -> Port:
    tensor = next(tensor for tensor in tensors if tensor.name == name)
    return Port(
        step=index,
        model=config.name,
        tensor=name,
        data_type=tensor.data_type,
        dims=tuple(tensor.dims),
        batched=config.max_batch_size > 0,
    )


def _did_you_mean(name: str, names: Sequence[str]) -> str | None:
    guess = nearest(name, names)
    return f"did you mean {guess!r}?" if guess else None
