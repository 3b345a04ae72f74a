"""A run's numbers over HTTP: `/metrics` for Prometheus, `/health` for supervisors that restart hung runs.

    training thread ── publish(Reading) at logged steps ──▶ one reference ◀── collect ── a thread a request
                    ── stepped() at every step ───────────▶ one clock     ◀── health

A scrape asks nothing of the training thread and nothing of a device: it sees the newest reading. `grafana.json`, beside
this file, is a dashboard of these metrics.
"""

from __future__ import annotations

import errno
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kfac_dist.config.schema import MetricsConfig
from kfac_dist.errors import ConfigError
from kfac_dist.reporting.run_file import launcher_restarts as launcher_restarts

if TYPE_CHECKING:
    from prometheus_client import Metric

DASHBOARD = "grafana.json"
# A restarted run may have to wait until the last process of its killed predecessor lets go of the port.
_RESTART_PATIENCE_SECONDS = 15.0
_CLIENT_SECONDS = 10.0


@dataclass(frozen=True)
class Reading:
    """One optimizer's run as of a logged step.

    Attributes:
        step: Optimizer steps done.
        loss: Mean training loss since the last logged step.
        learning_rate: Of this step.
        samples_per_second: Since the last logged step, over all ranks.
        skipped_steps: Steps that were measured and not taken, because gradients were not finite.
        damping: λ; None without K-FAC.
        failed_inversions: Units that rank 0 could not solve, and left as they were.
        raised_dampings: Factors that rank 0 inverted with more damping than configured, for negative eigenvalues.
        dropped_statistics: Times that a rank has dropped non-finite statistics of a step.
        phase_seconds: Seconds that rank 0 spent in each phase of K-FAC's steps.
        collectives: Collectives that rank 0 took part in, by label.
        bytes_sent: Bytes that rank 0 sent in them.
    """

    step: int
    loss: float
    learning_rate: float
    samples_per_second: float
    skipped_steps: int = 0
    damping: float | None = None
    failed_inversions: int = 0
    raised_dampings: int = 0
    dropped_statistics: int = 0
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    collectives: Mapping[str, int] = field(default_factory=dict)
    bytes_sent: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Watched:
    """The run that is under way."""

    optimizer: str
    total_steps: int
    last_saved: Callable[[], float | None]
    reading: Reading | None = None


class Exporter:
    """Serves one process's metrics until it is closed; a context.

    Args:
        config: The address, and the time after which a run counts as hanging; its `port` is set.
        run: The run's name, a label of every metric.

    Attributes:
        address: Host and port as in a URL.

    Raises:
        ConfigError: prometheus-client is missing, or the address can't be listened on.
    """

    def __init__(self, config: MetricsConfig, run: str) -> None:
        assert config.port is not None
        self._prometheus = _import_prometheus()
        self._run = run
        self._stale_seconds = config.stale_seconds
        self._watched: _Watched | None = None
        self._stepped = time.monotonic()
        self._registry = self._prometheus.CollectorRegistry()
        self._prometheus.ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self._server = _listen(config.host, config.port, self)
        self.address = f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; the port is free afterwards."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # ---- the training thread

    def watch(self, optimizer: str, total_steps: int, last_saved: Callable[[], float | None]) -> None:
        """Begin a run: from now on its metrics are served.

        Args:
            optimizer: Name of its optimizer, a label of its metrics.
            total_steps: Its length.
            last_saved: When its newest checkpoint was complete, in seconds since 1970; asked at each scrape.
        """
        self._watched = _Watched(optimizer, total_steps, last_saved)
        self.stepped()

    def stepped(self) -> None:
        """Take note that a step was taken."""
        self._stepped = time.monotonic()

    def publish(self, reading: Reading) -> None:
        """Serve these numbers from now on."""
        watched = self._watched
        assert watched is not None
        self._watched = _Watched(watched.optimizer, watched.total_steps, watched.last_saved, reading)

    # ---- the server's threads

    def metrics(self) -> tuple[bytes, str]:
        """Return the metrics as text, and its type."""
        return self._prometheus.generate_latest(self._registry), self._prometheus.CONTENT_TYPE_LATEST

    def health(self) -> tuple[int, dict[str, Any]]:
        """Return an HTTP status and its explanation."""
        age = time.monotonic() - self._stepped
        reading = None if self._watched is None else self._watched.reading
        well = age <= self._stale_seconds
        return 200 if well else 503, {
            "status": "advancing" if well else "standing still",
            "seconds_since_step": round(age, 3),
            "stale_seconds": self._stale_seconds,
            "logged_step": None if reading is None else reading.step,
        }

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the newest reading; called by the registry at each scrape."""
        yield from self._restarts()
        if self._watched is None:
            return
        labels = {"run": self._run, "optimizer": self._watched.optimizer}
        yield self._gauge("total_steps", "Optimizer steps of the whole run.", {(): self._watched.total_steps}, labels)
        yield self._gauge(
            "last_step_age_seconds", "Since the last optimizer step.", {(): time.monotonic() - self._stepped}, labels
        )
        saved = self._watched.last_saved()
        if saved is not None:
            age = {(): max(0.0, time.time() - saved)}
            yield self._gauge("checkpoint_age_seconds", "Since the newest checkpoint was complete.", age, labels)
        if self._watched.reading is not None:
            yield from self._of(self._watched.reading, labels)

    def _of(self, reading: Reading, labels: Mapping[str, str]) -> Iterator[Metric]:
        yield self._gauge("step", "Optimizer steps done.", {(): reading.step}, labels)
        yield self._gauge("loss", "Mean training loss since the last logged step.", {(): reading.loss}, labels)
        yield self._gauge("learning_rate", "Learning rate of the last step.", {(): reading.learning_rate}, labels)
        yield self._gauge(
            "samples_per_second", "Samples trained on, over all ranks.", {(): reading.samples_per_second}, labels
        )
        yield self._counter(
            "skipped_steps", "Steps not taken because gradients weren't finite.", {(): reading.skipped_steps}, labels
        )
        collectives = {(name,): value for name, value in reading.collectives.items()}
        yield self._counter("collectives", "Collectives of rank 0, by content.", collectives, labels, ("content",))
        sent = {(name,): value for name, value in reading.bytes_sent.items()}
        yield self._counter("bytes_sent", "Bytes that rank 0 sent in collectives.", sent, labels, ("content",))
        if reading.damping is None:
            return
        yield self._gauge("damping", "Damping of K-FAC's factors.", {(): reading.damping}, labels)
        yield self._counter(
            "failed_inversions", "Units that rank 0 could not solve.", {(): reading.failed_inversions}, labels
        )
        yield self._counter(
            "raised_dampings", "Factors that rank 0 inverted with more damping.", {(): reading.raised_dampings}, labels
        )
        yield self._counter(
            "dropped_statistics", "Statistics of a rank that weren't finite.", {(): reading.dropped_statistics}, labels
        )
        phases = {(name,): value for name, value in reading.phase_seconds.items()}
        yield self._counter("phase_seconds", "Seconds of rank 0 in phases of K-FAC.", phases, labels, ("phase",))

    def _restarts(self) -> Iterator[Metric]:
        counts = {(by,): number for by, number in launcher_restarts().items()}
        yield self._gauge("restarts", "How often the job was started again.", counts, {"run": self._run}, ("by",))

    def _gauge(self, *arguments: Any) -> Metric:
        return _filled(self._prometheus.core.GaugeMetricFamily, *arguments)

    def _counter(self, *arguments: Any) -> Metric:
        return _filled(self._prometheus.core.CounterMetricFamily, *arguments)


def _filled(
    family: Callable[..., Any],
    name: str,
    text: str,
    values: Mapping[tuple[str, ...], float],
    labels: Mapping[str, str],
    own: tuple[str, ...] = (),
) -> Metric:
    """Return a family of `kfac_dist_<name>` with one sample for each value; its keys are the `own` labels' values."""
    metric: Metric = family(f"kfac_dist_{name}", text, labels=[*labels, *own])
    for key, value in values.items():
        metric.add_metric([*labels.values(), *key], value)  # type: ignore[attr-defined]
    return metric


def _import_prometheus() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError as error:
        raise ConfigError(
            "metrics.port needs prometheus-client: pip install 'kfac_dist[metrics]', or set metrics.port to null"
        ) from error
    return prometheus_client


class _Handler(BaseHTTPRequestHandler):
    """Answers GET."""

    server: _Server
    timeout = _CLIENT_SECONDS

    def do_GET(self) -> None:
        match self.path.split("?")[0]:
            case "/metrics":
                self._answer(200, *self.server.exporter.metrics())
            case "/health":
                status, health = self.server.exporter.health()
                self._answer(status, json.dumps(health).encode() + b"\n", "application/json")
            case _:
                self._answer(404, b"there are /metrics and /health\n", "text/plain; charset=utf-8")

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Leave a run's output to the run."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, family: socket.AddressFamily, address: Any, exporter: Exporter) -> None:
        self.address_family = family
        self.exporter = exporter
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind, and ask no name server for this host's name, as the base class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]


def _listen(host: str, port: int, exporter: Exporter) -> _Server:
    restarted = any(launcher_restarts().values())
    deadline = time.monotonic() + (_RESTART_PATIENCE_SECONDS if restarted else 0.0)
    while True:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            return _Server(family, address, exporter)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            raise ConfigError(
                f"metrics.port {port} at metrics.host {host} can't be served: {error.strerror or error}; set "
                "metrics.port to a free port, or to null"
            ) from error
