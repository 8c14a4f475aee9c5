"""Arms side by side, as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from .findings import Finding, Row
from .measures import Span
from .recall import NEAR


def recall_table(findings: Mapping[str, Finding], spans: Sequence[Span]) -> Table:
    """Shares of right answers: facts beyond the window and within it, and the voice."""
    table = Table(title="Recall: share of right answers [95% interval]")
    table.add_column("")
    for span in spans:
        table.add_column(f"far, {span.name}", justify="right")
    for title in (f"near, {spans[0].name}", f"voice, {spans[0].name}", f"voice, {spans[-1].name}"):
        table.add_column(title, justify="right")
    for finding in findings.values():
        figures = [finding.share(span) for span in spans]
        figures.append(finding.share(spans[0], which=NEAR))
        figures += [finding.share(span, "voice") for span in (spans[0], spans[-1])]
        table.add_row(finding.name, *map(share, figures))
    return table


def nats_table(
    findings: Mapping[str, Finding],
    spans: Sequence[Span],
    beside: str = "full",
    compared: Sequence[Span] | None = None,
) -> Table:
    """Cross-entropy: its parts at the first span, the whole at all, and beside another arm's.

    Args:
        compared: where it is set beside the other's; at the first span by default, since what was
            trained on short conversations is no measure for long ones.
    """
    compared = spans[:1] if compared is None else compared
    table = Table(title=f"Cross-entropy: nats per frame, and excess over {beside} [95% interval]")
    table.add_column("")
    for title in ("text", "first", "rest"):
        table.add_column(f"{title}, {spans[0].name}", justify="right")
    for span in spans:
        table.add_column(f"all, {span.name}", justify="right")
    other = findings.get(beside)
    for span in compared if other else ():
        table.add_column(f"excess, {span.name}", justify="right")
    for finding in findings.values():
        parts = [finding.nats(spans[0], name) for name in ("text", "first", "rest")]
        wholes = [finding.nats(span) for span in spans]
        cells = [nats(row) for row in parts + wholes]
        if other:
            cells += [percent(finding.excess(other, span)) for span in compared]
        table.add_row(finding.name, *cells)
    return table


def cost_table(findings: Mapping[str, Finding]) -> Table:
    """State of one conversation and time per step."""
    table = Table(title="Cost of one conversation")
    table.add_column("")
    for title in ("state (kB)", "step p50 (ms)", "step p99 (ms)"):
        table.add_column(title, justify="right")
    for finding in findings.values():
        cost = finding.results["cost"]
        steps = cost["step_ms"]
        table.add_row(
            finding.name,
            f"{cost['state_bytes'] / 1e3:,.1f}",
            f"{steps['p50']:.2f}",
            f"{steps['p99']:.2f}",
        )
    return table


def share(row: Row) -> str:
    value, low, high = row
    if value is None:
        return "-"
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.2f}, {high:.2f}]"


def nats(row: Row) -> str:
    return "-" if row[0] is None else f"{row[0]:.4f}"


def percent(row: Row) -> str:
    value, low, high = row
    if value is None:
        return "-"
    return f"{value:+.1%}" if low is None else f"{value:+.1%} [{low:+.1%}, {high:+.1%}]"
