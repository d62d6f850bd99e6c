# SPDX-License-Identifier: Apache-2.0
"""The results of a benchmark in docs/performance.md, and its plot beside it: `--page`.

A page has a part for each benchmark, between two comments that name it; the rest is written by
people and left as it is.
"""

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pygal
from pygal import style

from bench import pods

DOCS = Path(__file__).parents[1] / "docs"
PLOTTED = ("pod up", "pod down", "ExecSync")
SAYING = (("runc", "--version"), ("crun", "--version"), ("containerd", "--version"))


def write(part: str, rows: Sequence[pods.Row], misses: Sequence[str]) -> None:
    """Put a table into the page, and what the machine was. Raises ValueError when the page has no
    such part.
    """
    page = DOCS / "performance.md"
    begin, end = f"<!-- {part}: written by make bench -->", f"<!-- end of {part} -->"
    head, _, rest = page.read_text().partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"{page.name} has no part {begin}")
    page.write_text("\n\n".join([head + begin, machine(), table(rows), kept(misses), end]) + tail)


def machine() -> str:
    """Return a paragraph on what it was measured with and on."""
    cores, load = os.cpu_count(), os.getloadavg()[0]
    versions = ", ".join(_first_line(command) for command in SAYING)
    python = platform.python_version()
    return (
        f"Measured on Linux {platform.release()} with {cores} cores (load {load:.1f} at the end), "
        f"Python {python}, {versions}."
    )


def _first_line(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.partition("\n")[0].removeprefix("containerd github.com/containerd/")


def table(rows: Sequence[pods.Row]) -> str:
    """Return a Markdown table: a column for each socket, then the ratios to the last."""
    names = list(rows[0].values)
    heads = ["row", *names, *(f"{name} / {names[-1]}" for name in names[:-1])]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        last = row.values[names[-1]]
        cells = [f"{row.values[name]:.2f} {row.unit}" for name in names]
        ratios = [f"{row.values[name] / last:.2f}" if last else "" for name in names[:-1]]
        lines.append(_line([row.name, *cells, *ratios]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def kept(misses: Sequence[str]) -> str:
    """Return what became of the limits."""
    return "\n".join(f"- **Missed**: {miss}" for miss in misses) or "All limits were kept."


def plot(name: str, rows: Sequence[pods.Row]) -> None:
    """Draw the rows of `PLOTTED` as bars, one for each socket, into docs/`name`.svg."""
    chosen = [row for row in rows if row.name in PLOTTED]
    chart = pygal.Bar(
        title="milliseconds, less is better",
        style=style.CleanStyle,
        js=(),
        height=360,
        legend_at_bottom=True,
        print_values=True,
        value_formatter=lambda value: f"{value:.0f}",
    )
    chart.x_labels = [row.name for row in chosen]
    for socket in rows[0].values:
        chart.add(socket, [row.values[socket] for row in chosen])
    chart.render_to_file(os.fspath(DOCS / f"{name}.svg"))
