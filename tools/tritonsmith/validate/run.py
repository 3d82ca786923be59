"""Asking the server in every way, and comparing all that it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.artifact import Manifest
from tritonsmith.client import Client, Model, Signature
from tritonsmith.errors import UsageError, ValidationError
from tritonsmith.gate import GateReport, check_budget, judge, predict
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.metrics import metric_module, parse_metric
from tritonsmith.samples import Samples, check_npz, load_served_samples
from tritonsmith.validate.compare import compare, show
from tritonsmith.validate.references import (
    Arrays,
    Reference,
    Say,
    is_ensemble,
    open_references,
    published_manifest,
    published_version,
    step_models,
)
from tritonsmith.validate.report import Check, Mixing, ValidationReport, Worst

# One sample a request: this many show it, also where there are ten thousand samples.
ONE_BY_ONE_COUNT = 128
CONCURRENCY_COUNT = 16
# A fast model may answer each request before the next arrives; so ask again before saying that nothing mixed.
MIXING_ROUNDS_COUNT = 3
SETTLING_S = 0.03
SETTLING_READS_COUNT = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model under test and the samples to test it with."""

    signature: Signature
    samples: Samples
    few: Samples  # those that go one by one
    few_indices: tuple[int, ...]  # of `few` in `samples`

    @property
    def batched(self) -> bool:
        return self.signature.max_batch_size > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the server answered to some samples; each output is `[samples, ...]`."""

    protocol: str
    mode: str
    indices: tuple[int, ...]  # of the samples
    outputs: Arrays


@dataclass(frozen=True, slots=True)
class Runner:
    """A function of one request as a session, so that `predict` can batch for it."""

    function: Callable[[Arrays], dict[str, NDArray[Any]]]

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        return self.function(inputs)


def validate(
    repository: Path,
    name: str,
    samples_path: Path,
    *,
    against: str | None = None,
    http_url: str | None = None,
    grpc_url: str | None = None,
    target: str | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    options: ConvertOptions | None = None,
    timeout_s: float = 60.0,
    say: Say = lambda _: None,
) -> ValidationReport:
    """Compare the newest version's served outputs with references; a missed tolerance is in the report.

    Args:
        samples_path: an .npz with one array per input, samples on the first axis, labels under `target`.
            Text and files are S or U arrays; an S array cannot hold bytes that end in NUL.
        against: the trained model, as `convert` takes it; `options` says how to read it.
        http_url, grpc_url: a running server; without either, the embedded server is started.
        target: the further target to serve; for the embedded server, a running one serves what it serves.
        metric, max_drop: measured on all samples through the endpoint and judged against the first
            reference. Default: those of the gate that the model passed. Samples with labels but without a
            gate are measured by accuracy, or by mae where labels are floats, without a budget.

    Raises:
        ValidationError: there is nothing to compare with, or nothing was compared.
        SamplesError: samples that do not fit the served model or the metric.
        UsageError: also for a gate's metric that is Python code, without `options.allow_code`.
        SourceError, RepositoryError, ServerError, ClientError: as their names say.
    """
    check_npz(samples_path)
    if metric is not None:
        check_budget(parse_metric(metric), max_drop)
    version = published_version(repository, name)
    manifest = published_manifest(repository, name)
    options = options or ConvertOptions()
    if metric is None:
        _refuse_code(manifest, allow_code=options.allow_code)
    with ExitStack() as stack:
        urls = stack.enter_context(_endpoints(repository, name, http_url, grpc_url, target, say))
        clients = {
            protocol: stack.enter_context(Client(url, protocol=protocol, timeout_s=timeout_s))
            for protocol, url in urls.items()
        }
        control = clients.get("grpc") or clients["http"]
        signature = control.model(name, version).signature
        subject = _subject(signature, samples_path)
        references = stack.enter_context(
            open_references(repository, signature, control, against, options, say)
        )
        expected = {reference.name: _expect(subject, reference, say) for reference in references}
        answers, mixing = _ask_all(subject, clients, say)
    checks = tuple(
        _check(subject, reference, answer, expected[reference.name][answer.mode], output.name)
        for answer in answers
        for reference in references
        for output in signature.outputs
    )
    if not sum(check.values_count for check in checks):
        raise ValidationError(
            f"not one value of {name!r} was compared",
            found=f"{len(checks)} outputs, all of them empty",
            expected="at least one value",
        )
    complete = next(answer for answer in answers if len(answer.indices) == subject.samples.count)
    baseline = expected[references[0].name][complete.mode]
    measured = _measure(subject, manifest, complete.outputs, baseline, metric, max_drop, say)
    return ValidationReport(
        model=name,
        version=version,
        samples=str(samples_path),
        samples_sha256=subject.samples.sha256,
        samples_count=subject.samples.count,
        checks=checks,
        mixing=mixing,
        metric=measured,
        notes=tuple(_notes(subject, clients, mixing, checks, measured)),
    )


def _refuse_code(manifest: Manifest | None, *, allow_code: bool) -> None:
    """Raise where the gate's metric is Python code: a file in a repository may not run any by itself."""
    metric = None if manifest is None or manifest.gate is None else str(manifest.gate["metric"])
    if metric is not None and metric_module(metric) is not None and not allow_code:
        raise UsageError(
            "the metric of the gate that the model passed names Python code",
            found=metric,
            fix="add --allow-code if you trust this repository, or name the metric yourself with --metric",
        )


@contextmanager
def _endpoints(
    repository: Path,
    name: str,
    http_url: str | None,
    grpc_url: str | None,
    target: str | None,
    say: Say,
) -> Iterator[dict[str, str]]:
    """Protocol -> address, of the servers named or of one that lives as long as the block."""
    if http_url or grpc_url:
        if target is not None:
            raise UsageError(
                "--target and --url exclude each other: a running server was told its target when it started",
                fix="leave --target out",
            )
        given = {"http": http_url, "grpc": grpc_url}
        yield {protocol: url for protocol, url in given.items() if url}
        return
    from tritonsmith.server.options import ServerOptions
    from tritonsmith.server.process import serve

    options = ServerOptions(
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        model_control="explicit",
        load_models=(name,),
        target=target,
    )
    with serve(repository, options, say=say) as server:
        yield {"http": server.http_url, "grpc": server.grpc_url}


def _subject(signature: Signature, samples_path: Path) -> Subject:
    if "sequence_batching" in signature.config:
        raise ValidationError(
            f"{signature.model!r} is served in sequences, where an answer depends on the requests before it",
            expected="a model whose requests stand alone",
            fix="validate the same file under a name of its own, without sequence_batching",
        )
    batched = signature.max_batch_size > 0
    samples = load_served_samples(samples_path, signature)
    count = min(samples.count, ONE_BY_ONE_COUNT) if batched else samples.count
    indices = np.linspace(0, samples.count - 1, count).round().astype(int)
    few = replace(
        samples, arrays={name: array[indices] for name, array in samples.arrays.items()}, target=None
    )
    return Subject(
        signature=signature, samples=samples, few=few, few_indices=tuple(int(index) for index in indices)
    )


def _expect(subject: Subject, reference: Reference, say: Say) -> dict[str, Arrays]:
    """The reference's outputs by mode, computed in the batches in which the server is asked.

    Requests that the server mixes are held against samples computed alone.
    """
    say(f"computing what to expect from the {reference.name}")
    session = Runner(reference.run)
    alone = predict(session, subject.few, batched=subject.batched, batch_size=1)
    expected: dict[str, Arrays] = {"single": alone, "concurrent": alone}
    if subject.batched:
        size = subject.signature.max_batch_size
        expected["batched"] = predict(session, subject.samples, batched=True, batch_size=size)
    return expected


def _ask_all(
    subject: Subject, clients: Mapping[str, Client], say: Say
) -> tuple[tuple[Answers, ...], tuple[Mixing, ...]]:
    answers: list[Answers] = []
    mixing: list[Mixing] = []
    every = tuple(range(subject.samples.count))
    few = subject.few_indices
    for protocol, client in clients.items():
        model = client.model(subject.signature.model, subject.signature.version or None)
        say(f"asking {subject.signature.model} over {protocol}")
        outputs: Arrays = predict(Runner(model), subject.few, batched=subject.batched, batch_size=1)
        answers.append(Answers(protocol=protocol, mode="single", indices=few, outputs=outputs))
        if subject.batched:
            size = subject.signature.max_batch_size
            outputs = predict(Runner(model), subject.samples, batched=True, batch_size=size)
            answers.append(Answers(protocol=protocol, mode="batched", indices=every, outputs=outputs))
        outputs, seen = _ask_together(subject, client, model, protocol)
        answers.append(Answers(protocol=protocol, mode="concurrent", indices=few, outputs=outputs))
        mixing += seen
    return tuple(answers), tuple(mixing)


def _ask_together(
    subject: Subject, client: Client, model: Model, protocol: str
) -> tuple[Arrays, list[Mixing]]:
    """One sample a request, many at once, in rounds until the server mixed some or will not."""
    signature = subject.signature
    names = step_models(signature) if is_ensemble(signature) else [signature.model]
    rows = [
        replace(
            subject.few, arrays={name: array[row : row + 1] for name, array in subject.few.arrays.items()}
        )
        for row in range(subject.few.count)
    ]

    def ask(row: Samples) -> dict[str, NDArray[Any]]:
        return predict(Runner(model), row, batched=subject.batched, batch_size=1)

    before = {name: _settled_statistics(client, name) for name in names}
    with ThreadPoolExecutor(CONCURRENCY_COUNT) as threads:
        for _ in range(MIXING_ROUNDS_COUNT):
            replies = list(threads.map(ask, rows))
            after = {name: _settled_statistics(client, name) for name in names}
            seen = [_mixing(protocol, name, before[name], after[name]) for name in names]
            if subject.few.count == 1 or any(item.mixed for item in seen) or not subject.batched:
                break
    outputs = {name: np.concatenate([reply[name] for reply in replies]) for name in replies[0]}
    return outputs, seen


def _settled_statistics(client: Client, name: str) -> dict[str, Any]:
    """Statistics that stand still: Triton counts a request a moment after it has answered it."""
    seen = client.statistics(name)
    for _ in range(SETTLING_READS_COUNT):
        time.sleep(SETTLING_S)
        last, seen = seen, client.statistics(name)
        if seen.get("inference_count") == last.get("inference_count"):
            break
    return seen


def _mixing(protocol: str, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Mixing:
    """What was executed between two statistics; gRPC writes their numbers as strings, and no zeros."""
    old = {int(entry["batch_size"]): _executions(entry) for entry in before.get("batch_stats", ())}
    new = {int(entry["batch_size"]): _executions(entry) for entry in after.get("batch_stats", ())}
    grown = [size for size, count in new.items() if count > old.get(size, 0)]

    def growth(key: str) -> int:
        return int(after.get(key, 0)) - int(before.get(key, 0))

    return Mixing(
        protocol=protocol,
        model=name,
        samples_count=growth("inference_count"),
        executions_count=growth("execution_count"),
        largest_batch=max(grown, default=0),
    )


def _executions(entry: Mapping[str, Any]) -> int:
    return int(entry.get("compute_infer", {}).get("count", 0))


def _check(subject: Subject, reference: Reference, answer: Answers, expected: Arrays, output: str) -> Check:
    served, wanted = answer.outputs[output], expected[output]
    tolerance = reference.tolerances[output]
    found = compare(output, served, wanted, tolerance)
    worst = None
    if found.worst is not None:
        worst = Worst(
            sample=answer.indices[found.worst[0]],
            place=found.worst[1:],
            served=show(served[found.worst]),
            expected=show(wanted[found.worst]),
        )
    return Check(
        protocol=answer.protocol,
        mode=answer.mode,
        against=reference.name,
        output=output,
        samples_count=len(answer.indices),
        values_count=served.size,
        max_abs_error=found.max_abs_error,
        max_rel_error=found.max_rel_error,
        tolerance=tolerance,
        passed=found.passed,
        worst=worst,
    )


def _measure(
    subject: Subject,
    manifest: Manifest | None,
    served: Arrays,
    baseline: Arrays,
    metric: str | None,
    max_drop: float | None,
    say: Say,
) -> GateReport | None:
    """The metric through the endpoint: as asked for, else the gate's, else what the labels are made for."""
    target = subject.samples.target
    gate = manifest.gate if manifest is not None else None
    if metric is None and gate is not None and not is_ensemble(subject.signature):
        metric = str(gate["metric"])
        if max_drop is None and isinstance(budget := gate["max_drop"], (int, float)):
            max_drop = float(budget)
        if target is None and parse_metric(metric).needs_target:
            return None
    if metric is None and target is not None:
        metric = "mae" if target.dtype.kind == "f" else "accuracy"
    if metric is None:
        if max_drop is not None:
            raise UsageError("a budget needs a metric", fix="add --metric")
        return None
    return judge(
        parse_metric(metric), baseline=baseline, candidate=served, target=target, max_drop=max_drop, say=say
    )


def _notes(
    subject: Subject,
    clients: Mapping[str, Client],
    mixing: tuple[Mixing, ...],
    checks: tuple[Check, ...],
    metric: GateReport | None,
) -> Iterator[str]:
    if len(clients) < 2:
        yield f"only {next(iter(clients))} was compared: no address of the other protocol was given"
    if subject.few.count < subject.samples.count:
        yield f"single and concurrent requests took {subject.few.count} of {subject.samples.count} samples"
    if subject.few.count == 1:
        yield "with one sample, no requests can be mixed"
    for protocol in clients:
        executed = [item for item in mixing if item.protocol == protocol and item.executions_count]
        if subject.batched and executed and not any(item.mixed for item in executed):
            yield f"over {protocol}, the server executed each concurrent request by itself: nothing was mixed"
    recorded = any(check.tolerance is None for check in checks)
    if recorded and (metric is None or metric.max_drop is None):
        yield (
            "differences from the source are recorded and not judged, because the precision is reduced: "
            "give samples with labels, --metric and --max-drop"
        )
    if "response_cache" in subject.signature.config:
        yield "the model has a response cache: repeated requests may not have been computed again"
