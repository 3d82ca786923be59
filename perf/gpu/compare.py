"""TensorRT plans and PyTorch beside each other on one GPU, in one run: ResNet-50, MiniLM, batches 1 to 128.

    compare.py --models FOLDER --plans FOLDER --out gpu.json --minutes N --torch-python PYTHON

Three processes measure (plans.py, torch_rows.py twice) and are asked in turn. Every subject is compiled and
compared with ONNX Runtime's FP32 answers first; then rounds go through all subjects, forth and back, batch by
batch. The file is written after each step, so that a run that is cut off leaves what it had; plans are kept,
so that the next one begins with them. Of each call two clocks are read: `gpu`, by CUDA events, with inputs on
the GPU; `call`, from numpy to numpy. Run by tests/gpu/run.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reference import read_description
from subjects import ALSO_COMPARED, BATCHES, MODELS, SUBJECTS, Row, Subject, int8_verdicts
from worker import Worker, WorkerError

from tritonsmith.files import write_text_atomically
from tritonsmith.machine import describe_machine

HERE = Path(__file__).resolve().parent
ROUNDS = 5
WINDOW_S = 0.1  # a subject runs about this long in a round
FEWEST_RUNS, MOST_RUNS, MOST_CALLS = 5, 60, 10
WARMUP = 3
PREPARE_SHARE = 0.6  # of the time, for compiling; what is not ready then is left out and says so
ASK_S = 600.0
COMPILING = "torch.compile"  # a process of its own: compilers hang and crash, and take nothing else with them


class Bench:
    """One run, and what it has found so far."""

    def __init__(self, options: argparse.Namespace, commands: Mapping[str, Sequence[str]]) -> None:
        self.options = options
        self.began_s = time.monotonic()
        self.rows = [
            Row(subject=subject, model=model, batch=batch)
            for batch in BATCHES
            for model in MODELS
            for subject in SUBJECTS
        ]
        self.head: dict[str, Any] = {"command": "tests/gpu/run.sh run", "machine": describe_machine()}
        self.plans: dict[tuple[str, str], dict[str, Any]] = {}
        self.compared: list[dict[str, Any]] = []
        self.rounds = 0
        self.commands = commands
        self.workers: dict[str, Worker] = {}

    def run(self) -> None:
        """Prepare, then measure until the rounds or the time are over.

        Raises:
            WorkerError: no TensorRT or no GPU: nothing can be measured.
        """
        self._start("tensorrt", os.environ)
        facts = self.ask("tensorrt", "facts")
        if "unavailable" in facts:
            raise WorkerError(f"no GPU: {facts['unavailable']}")
        for name in ("pytorch", COMPILING):
            self._start(name, torch_environment(self.options.plans))
        self.head |= {"gpu": facts.pop("gpu"), "tensorrt": facts, "pytorch": self._torch_facts()}
        self.head["models"] = {name: model_facts(self.options.models / name) for name in MODELS}
        self.write()
        for model in MODELS:
            for precision in ("fp16", "int8", "fp32"):
                self._build(model, precision)
        for row in sorted(self.rows, key=lambda row: row.subject.mode == "compile"):
            self._prepare(row)
        for index in range(ROUNDS):
            if not self._measure_round(self.rows if index % 2 == 0 else self.rows[::-1]):
                break
            self.rounds += 1
        self.write(complete=self.rounds == ROUNDS)

    def ask(self, worker: str, do: str, **arguments: Any) -> dict[str, Any]:
        timeout_s = max(5.0, min(ASK_S, self.left_s()))
        return self.workers[worker].ask(do, timeout_s=timeout_s, **arguments)

    def left_s(self) -> float:
        return self.options.minutes * 60 - (time.monotonic() - self.began_s)

    def write(self, *, complete: bool = False) -> None:
        """The result as it stands, a row a line."""
        head = {
            **self.head,
            "complete": complete,
            "rounds": self.rounds,
            "duration_s": round(time.monotonic() - self.began_s, 1),
            "clocks": {"gpu": "CUDA events, inputs on the GPU", "call": "from numpy to numpy"},
            "int8_beside_fp16": int8_verdicts(self.rows),
        }
        lists = {
            "plans": list(self.plans.values()),
            "compared": self.compared,
            "rows": [row.json() for row in self.rows],
        }
        text = json.dumps(head, indent=1)[:-2]
        for name, items in lists.items():
            text += f',\n "{name}": [' + ",".join(f"\n  {json.dumps(item)}" for item in items) + "\n ]"
        write_text_atomically(self.options.out, text + "\n}\n")

    def _start(self, name: str, environment: Mapping[str, str]) -> None:
        self.workers[name] = Worker(f"the process of {name}", self.commands[name], environment)

    def _torch_facts(self) -> dict[str, Any]:
        try:
            return self.ask("pytorch", "facts")
        except WorkerError as error:
            return {"unavailable": str(error)}

    def _build(self, model: str, precision: str) -> None:
        say(f"plan {model} {precision}")
        if 1 - self.left_s() / (self.options.minutes * 60) > PREPARE_SHARE:
            reason = f"not built within {PREPARE_SHARE:.0%} of {self.options.minutes} minutes"
            self.plans[model, precision] = {"model": model, "precision": precision, "failed": reason}
            return
        try:
            plan = self.ask("tensorrt", "build", model=model, precision=precision)
        except WorkerError as error:
            plan = {"failed": str(error)}
            if self.workers["tensorrt"].ended:  # by its time-out: what was built before is on disk
                self._start("tensorrt", os.environ)
        self.plans[model, precision] = {"model": model, "precision": precision, **plan}
        if "failed" not in plan:
            for batch in ALSO_COMPARED:
                arguments = {"model": model, "precision": precision, "mode": "stream", "batch": batch}
                try:
                    answer = self.ask("tensorrt", "prepare", **arguments)
                except WorkerError as error:
                    answer = {"failed": str(error)}
                self.compared.append({"engine": "tensorrt", **arguments, **answer})
        self.write()

    def _prepare(self, row: Row) -> None:
        engine, spent = row.subject.engine, 1 - self.left_s() / (self.options.minutes * 60)
        failed = self.plans[row.model, row.subject.precision].get("failed") if engine == "tensorrt" else None
        unavailable = self.head["pytorch"].get("unavailable") if engine == "pytorch" else None
        if reason := failed or unavailable:
            row.unmeasured = reason
            return
        if spent > PREPARE_SHARE:
            row.unmeasured = f"not compiled within {PREPARE_SHARE:.0%} of {self.options.minutes} minutes"
            return
        say(f"preparing {text_of(row)}")
        try:
            answer = self.ask(worker_of(row), "prepare", **arguments_of(row))
        except WorkerError as error:
            row.unmeasured = str(error)
        else:
            row.unmeasured = None
            row.agreement, row.prepare_s = answer["agreement"], answer["prepare_s"]
        self.write()

    def _measure_round(self, rows: Sequence[Row]) -> bool:
        """One round; False where the time ended it."""
        say(f"round {self.rounds + 1} of {ROUNDS}")
        for row in rows:
            if row.unmeasured is not None:
                continue
            if self.left_s() < 2 * WINDOW_S:
                return False
            try:
                for clock, most in (("gpu", MOST_RUNS), ("call", MOST_CALLS)):
                    row.rounds_ns[clock].append(self._time(row, clock, most))
            except WorkerError as error:
                row.unmeasured = str(error)
        self.write()
        return True

    def _time(self, row: Row, clock: str, most: int) -> list[int]:
        before = row.rounds_ns[clock]
        if before:
            runs = len(before[0])
        else:
            probe = self.ask(worker_of(row), "time", **arguments_of(row), clock=clock, runs=2, warmup=WARMUP)
            runs = runs_for(min(probe["ns"]), most)
        answer = self.ask(worker_of(row), "time", **arguments_of(row), clock=clock, runs=runs, warmup=WARMUP)
        return list(answer["ns"])

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def commands_of(options: argparse.Namespace) -> dict[str, list[str]]:
    """How each process is started."""
    models, plans = str(options.models), str(options.plans)
    torch_rows = [options.torch_python, str(HERE / "torch_rows.py"), models]
    return {
        "tensorrt": [sys.executable, str(HERE / "plans.py"), models, plans],
        "pytorch": torch_rows,
        COMPILING: torch_rows,
    }


def runs_for(ns: float, most: int) -> int:
    """How many runs fill the window."""
    return max(FEWEST_RUNS, min(most, round(WINDOW_S * 1e9 / max(ns, 1))))


def arguments_of(row: Row) -> dict[str, Any]:
    subject: Subject = row.subject
    return {"model": row.model, "precision": subject.precision, "mode": subject.mode, "batch": row.batch}


def worker_of(row: Row) -> str:
    return COMPILING if row.subject.mode == "compile" else row.subject.engine


def text_of(row: Row) -> str:
    return f"{row.model} {row.subject.engine} {row.subject.precision} {row.subject.mode}, batch {row.batch}"


def model_facts(folder: Path) -> dict[str, Any]:
    """What was made of the model at home: hashes, bytes, and how near FP16 and INT8 came on a CPU."""
    description = read_description(folder)
    return {name: description[name] for name in ("opset", "files", "int8_step", "measured")}


def torch_environment(kept: Path) -> Mapping[str, str]:
    """This process' environment as it was before run.sh set it for TensorRT's Python."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")
    }
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        if value := os.environ.get(f"OUTER_{name}"):
            environment[name] = value
    return environment | {"TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor")}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--torch-python", default="python3")
    options = parser.parse_args(arguments)
    bench = Bench(options, commands_of(options))
    try:
        bench.run()
    except WorkerError as error:
        say(f"benchmark: {error}")
        return 1
    finally:
        bench.close()
    for verdict in int8_verdicts(bench.rows):
        if not verdict["faster"]:
            ratio = verdict["int8_as_fast_as_fp16"]
            say(f"INT8 is no faster than FP16: {verdict['model']}, batch {verdict['batch']}, {ratio:.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
