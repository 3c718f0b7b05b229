"""What operators see: Prometheus metrics, and logs as JSON lines. Never content."""

import json
import logging
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, InfoMetricFamily, Metric

from gvl_jax.serve.backend import Backend
from gvl_jax.serve.engine import Engine
from gvl_jax.serve.wire import Answer, code

LOG = logging.getLogger("gvl_jax.serve")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server."""

    def __init__(self, engine: Engine | Backend):
        self.registry = registry = CollectorRegistry()
        self.responses = Counter("guard_http_responses", "HTTP responses", ["route", "status"], registry=registry)
        self.judged = Counter("guard_judged", "judgements", ["route", "action"], registry=registry)
        self.blocked = Counter(
            "guard_model_blocked", "blocked: the model found harm, or its score did", ["route"], registry=registry
        )
        self.failed = Counter("guard_failed_closed", "blocked: no verdict", ["route", "reason"], registry=registry)
        self.gone = Counter("guard_clients_gone", "clients that left before their answer", registry=registry)
        self.seconds = Histogram(
            "guard_request_seconds", "from request to answer", ["route"], buckets=SECONDS, registry=registry
        )
        self.judge_seconds = Histogram(
            "guard_judge_seconds", "queue and model, of one judgement", buckets=SECONDS, registry=registry
        )
        for name in ("waiting", "running", "ready"):
            gauge = Gauge(f"guard_{name}", f"{name}, as the engine says", registry=registry)
            gauge.set_function(partial(_reading, engine, name))
        registry.register(_EngineCounters(engine))

    def count(self, route: str, answer: Answer) -> None:
        self.judged.labels(route, answer.decision.action).inc()
        self.judge_seconds.observe(answer.judge_ms / 1000)
        said = answer.judgement
        if said.status != "ok":
            self.failed.labels(route, code(said) or said.status).inc()
        elif answer.decision.action == "block":
            self.blocked.labels(route).inc()


def _reading(engine: Engine | Backend, name: Literal["waiting", "running", "ready"]) -> float:
    return float(getattr(engine, name))


class _EngineCounters:
    """The engine's own counters, and which weights answer."""

    def __init__(self, engine: Engine | Backend):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("guard_build", "what answers", value={"fingerprint": self.engine.fingerprint})
        for name, value in self.engine.counters().items():
            yield CounterMetricFamily(f"guard_engine_{name}", "of the engine", value=value)


class JsonLines(logging.Formatter):
    """One JSON object a line. Of an exception its type and where it was raised: its text may quote the content."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        row |= record.__dict__.get("fields", {})
        if record.exc_info and (error := record.exc_info[1]):
            frames = traceback.extract_tb(error.__traceback__)
            row["error"] = type(error).__name__
            row["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-6:]]
        return json.dumps(row, default=str)


def log_to_stderr() -> None:
    """All logs of the process as JSON lines; libraries from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("gvl_jax", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
