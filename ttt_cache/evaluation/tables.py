"""Arms side by side, as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from .crossentropy import MEASURES
from .findings import Finding, Row
from .measures import Span
from .recall import FAR, NEAR

STREAMS = {"text": "text", "first": "first codebook", "rest": "rest", "total": "all"}


def recall_table(findings: Mapping[str, Finding], spans: Sequence[Span]) -> Table:
    """Shares of right answers: facts beyond the window and within it, and the voice.

    Every column says how many questions its shares are of.
    """
    columns = [("far", "facts", FAR, span) for span in spans]
    columns.append(("near", "facts", NEAR, spans[0]))
    columns += [("voice", "voice", FAR, s) for s in dict.fromkeys((spans[0], spans[-1]))]
    table = Table(title="Recall: share of right answers [95% interval], n: questions")
    table.add_column("")
    for title, name, which, span in columns:
        asked = max((f.asked(span, name, which) for f in findings.values()), default=0)
        table.add_column(f"{title}, {span.name}\nn = {asked:,}", justify="right")
    for finding in findings.values():
        figures = (finding.share(span, name, which) for _, name, which, span in columns)
        table.add_row(finding.name, *map(share, figures))
    return table


def recall_by_table(findings: Mapping[str, Finding], span: Span, by: str, what: str) -> Table:
    """Shares of right answers, by the bins of a tally, with the questions of each.

    Args:
        by: `age`, or of far facts `load` or `rewritten`, see `Recall.result`.
        what: the bins are of, for people.
    """
    found = {
        name: {_bin(entry): entry for entry in finding.recalls[span.name].result()[f"by_{by}"]}
        for name, finding in findings.items()
        if span.name in finding.recalls
    }
    asked = {bin_: entry["asked"] for bins in found.values() for bin_, entry in bins.items()}
    facts = "facts" if by == "age" else "far facts"
    table = Table(title=f"Recall of {facts} by {what}, {span.name}: share of right answers")
    table.add_column(what)
    for begin, last in sorted(asked):
        name = f"{begin}" if begin == last else f"{begin}-{last}"
        table.add_column(name, justify="right")
    for name, bins in found.items():
        shares = (bins[bin_]["share"][0] if bin_ in bins else None for bin_ in sorted(asked))
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in shares))
    table.add_section()
    table.add_row("questions", *(f"{asked[bin_]:,}" for bin_ in sorted(asked)))
    return table


def nats_table(
    findings: Mapping[str, Finding],
    spans: Sequence[Span],
    beside: str = "full",
    compared: Sequence[Span] | None = None,
) -> Table:
    """Cross-entropy of whole frames at all spans, and beside another arm's.

    Args:
        compared: where it is set beside the other's; at the first span by default, since what was
            trained on short conversations is no measure for long ones.
    """
    compared = spans[:1] if compared is None else compared
    table = Table(title=f"Cross-entropy: nats per frame, and excess over {beside} [95% interval]")
    table.add_column("")
    for span in spans:
        table.add_column(f"all, {span.name}", justify="right")
    other = findings.get(beside)
    for span in compared if other else ():
        table.add_column(f"excess, {span.name}", justify="right")
    for finding in findings.values():
        cells = [nats(finding.nats(span)) for span in spans]
        if other:
            cells += [percent(finding.excess(other, span)) for span in compared]
        table.add_row(finding.name, *cells)
    return table


def parts_table(findings: Mapping[str, Finding], span: Span) -> Table:
    """Cross-entropy of text, first codebook and the rest apart."""
    title = f"Cross-entropy by stream, {span.name}: nats per frame [95% interval]"
    return _by_stream(title, findings, lambda f, stream: interval(f.nats(span, stream)))


def jump_table(findings: Mapping[str, Finding], window: int, beside: str) -> Table:
    """What is lost at once where the first frames leave the window."""
    other = findings.get(beside)
    title = f"Jump at frame {window:,}: excess over {beside} just beyond it, less just before it"
    return _by_stream(title, findings, lambda f, stream: percent(f.jump(other, window, stream)))


def slope_table(findings: Mapping[str, Finding], window: int) -> Table:
    """What is lost, or gained, little by little."""
    title = f"Slope from frame {window:,} on: nats per frame with every doubling of the position"
    return _by_stream(title, findings, lambda f, stream: interval(f.slope(window, stream), "+"))


def _by_stream(
    title: str, findings: Mapping[str, Finding], cell: Callable[[Finding, str], str]
) -> Table:
    table = Table(title=title)
    table.add_column("")
    for stream in MEASURES:
        table.add_column(STREAMS[stream], justify="right")
    for finding in findings.values():
        table.add_row(finding.name, *(cell(finding, stream) for stream in MEASURES))
    return table


def mass_table(findings: Mapping[str, Finding]) -> Table:
    """Attention to the memory and its entropy over virtual tokens, by layer, a figure a head."""
    table = Table(title="Attention to the memory: a figure for each head")
    titles = "", "layer", "tokens", "mass (share)", "entropy (bits)", "share of log2(tokens)"
    for title in titles:
        table.add_column(title)
    for finding in findings.values():
        for layer, found in finding.results["mass"].items():
            table.add_row(finding.name, layer, *_mass(found))
        table.add_section()
    return table


def _mass(found: Mapping[str, Any]) -> list[str]:
    """Of one layer; without virtual tokens there is no entropy, of one it is always 0."""
    tokens = found.get("virtual")
    entropy = [value / math.log(2) for value in found.get("entropy") or ()]
    relative = [value / math.log2(tokens) for value in entropy] if tokens and tokens > 1 else []
    heads = (_heads(found["mass"] or ()), _heads(entropy), _heads(relative))
    return ["-" if tokens is None else str(tokens), *heads]


def _heads(values: Sequence[float]) -> str:
    return "  ".join(f"{value:.3f}" for value in values) or "-"


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


def interval(row: Row, sign: str = "") -> str:
    """A value and between which it lies; `sign`: `+` where it may be below nothing."""
    value, low, high = row
    if value is None:
        return "-"
    shown = f"{value:{sign}.4f}"
    return shown if low is None else f"{shown} [{low:{sign}.3f}, {high:{sign}.3f}]"


def nats(row: Row) -> str:
    return "-" if row[0] is None else f"{row[0]:.4f}"


def percent(row: Row) -> str:
    value, low, high = row
    if value is None:
        return "-"
    return f"{value:+.1%}" if low is None else f"{value:+.1%} [{low:+.1%}, {high:+.1%}]"


def _bin(entry: Mapping[str, Any]) -> tuple[int, int]:
    """The first and the last whole number of a bin."""
    return entry["begin"], entry["end"] - 1
