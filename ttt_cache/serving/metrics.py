"""What the operator sees, in Prometheus's text format."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

# Those that a connection ends with. A client may send any other, and each would be a label.
CODES = {1000, 1001, 1002, 1003, 1005, 1006, 1007, 1008, 1009, 1011, 4001}
STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15, 0.25, 0.5, 1, 2)


class Metrics:
    """The server's own; two servers in one process do not share them.

    Args:
        rows: that there are.
        state_bytes: that they hold together.
    """

    def __init__(self, rows: int, state_bytes: int) -> None:
        self.registry = CollectorRegistry()
        registry = {"registry": self.registry, "namespace": "ttt_cache"}
        self._frames = Counter("frames", "Frames that were stepped", **registry)
        self._late = Counter("late_frames", "Frames answered after more than 80 ms", **registry)
        self._step = Histogram(
            "step_seconds", "Time of a step of all rows", buckets=STEP_BUCKETS, **registry
        )
        self._shared = Histogram(
            "step_rows",
            "Rows that shared a step",
            buckets=[2**k for k in range(12)],
            **registry,
        )
        self.conversations = Gauge("conversations", "Rows that are taken", **registry)
        Gauge("rows", "Rows that there are", **registry).set(rows)
        Gauge("state_bytes", "Bytes of all rows' state", **registry).set(state_bytes)
        self._refused = Counter("refused", "Connections refused", ["reason"], **registry)
        self._ended = Counter("ended", "Conversations ended, by close code", ["code"], **registry)
        self._saved = Counter("sessions_saved", "Sessions written", **registry)
        self._saved_bytes = Counter("sessions_bytes", "Bytes of sessions written", **registry)
        self._failed = Counter("sessions_failed", "Sessions that were not written", **registry)
        self.unsaved = Gauge("unsaved_seconds", "Age of the oldest unsaved frame", **registry)

    def stepped(self, rows: int, late: int, seconds: float) -> None:
        """One step was taken."""
        self._frames.inc(rows)
        self._late.inc(late)
        self._step.observe(seconds)
        self._shared.observe(rows)

    def refused(self, reason: str) -> None:
        """A client was turned away."""
        self._refused.labels(reason).inc()

    def ended(self, code: int) -> None:
        """A conversation ended."""
        self._ended.labels(str(code) if code in CODES else "other").inc()

    def saved(self, size: int | None) -> None:
        """A session was written, or (`None`) could not be."""
        if size is None:
            self._failed.inc()
            return
        self._saved.inc()
        self._saved_bytes.inc(size)

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry)
