"""Records of the five documents: form of their tables, and numbers from JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from common import spread, table

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
RECORDS = ("ge2025", "george2023", "haink2023", "karakida2020", "zhang2021")
HEADING = ["claim", "reported", "measured", "verdict", "command", "seconds"]
VERDICT = re.compile(r"(holds|does not|undecided)\b")


def claims(name: str) -> list[list[str]]:
    """Return the rows of all tables of claims of a page, the first of them first."""
    lines = (FOLDER / f"{name}.md").read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if line.startswith("|")
    ]
    assert cells[0] == HEADING, "a record opens with its claims"
    rows = []
    inside = False
    for row in cells:
        if inside and set(row[0]) <= set("-|"):
            continue
        inside = row == HEADING or (inside and len(row) == len(HEADING))
        if inside and row != HEADING:
            rows.append(row)
    return rows


@pytest.mark.parametrize("name", RECORDS)
def test_claims_have_a_verdict_and_a_command_with_a_result(name: str) -> None:
    rows = claims(name)
    assert len(rows) >= 10
    for claim, _, measured, verdict, command, seconds in rows:
        assert measured, claim
        assert VERDICT.match(verdict), (claim, verdict)
        assert command == seconds == "same" or re.search(r"\d", seconds), claim
        for script in re.findall(r"\w+(?=\.py)", command):
            assert (FOLDER / f"{script}.py").exists(), script
            assert (FOLDER / "results" / f"{script}.json").exists(), script


def result(name: str) -> Any:
    return json.loads((FOLDER / "results" / f"{name}.json").read_text("utf-8"))


def rows_of(name: str) -> Any:
    """Return the rows that a script printed, by part where it has parts."""
    found = result(name)
    if name == "george2023":
        return [row for part in found["parts"].values() for row in part["rows"]]
    if name == "spectrum_of_optimizers":
        return [
            dict(zip(("network", "optimizer", "rate"), key.split(", "), strict=True))
            | {field: spread([run[field] for run in runs]) for field in runs[0]}
            for key, runs in found["runs"].items()
        ]
    if name == "haink2023_networks":
        fields = dict.fromkeys(f for runs in found["runs"].values() for f in runs[0])
        rows = []
        for field in fields:
            row = {"quantity": field}
            for network, runs in found["runs"].items():
                values = [run[field] for run in runs if field in run]
                row[network] = spread(values) if values else "-"
            rows.append(row)
        return rows
    return found["rows"]


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("basis_quality", "george2023"),
        ("ge2025", "ge2025"),
        ("george2023", "george2023"),
        ("george2023_factors", "george2023"),
        ("haink2023", "haink2023"),
        ("haink2023_more", "haink2023"),
        ("haink2023_networks", "haink2023"),
        ("spectrum_of_optimizers", "README"),
    ],
)
def test_tables_of_pages_are_those_of_the_results(name: str, page: str) -> None:
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    lines = {" ".join(line.split()) for line in text.splitlines()}
    rows = rows_of(name)
    for part in rows.values() if isinstance(rows, dict) else [rows]:
        heading, _, *rest = table(part).splitlines()
        for line in (heading, *rest):
            assert " ".join(line.split()) in lines


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda p: p.stem)
def test_printed_tables_have_one_number_of_cells(page: Path) -> None:
    cells = 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"-{20,}", line):
            cells = len(re.split(r" {2,}", lines[number - 1].strip()))
        elif not line or line.startswith("```"):
            cells = 0
        elif cells and not re.fullmatch(r"\d+ s", line):
            assert len(re.split(r" {2,}", line.strip())) == cells, line


# -- tables of docs/ -------------------------------------------------------------------

DOCS = FOLDER.parent / "docs"
ABLATION = {
    "no polar factor: the natural direction": "no polar factor (natural)",
    "head: the natural direction": "head: natural direction",
    "head: the spectral direction": "head: spectral direction",
    "scalings not shared": "not shared",
    "shared below 1 of the mean, not 0.1": "shared below 1 of the mean",
    "half way to the Kronecker eigenvalues": "half way to Kronecker eigenvalues",
}


def table_of(page: str, corner: str) -> list[list[str]]:
    """Return the rows below the heading that starts with ``corner``."""
    text = (DOCS / page).read_text(encoding="utf-8")
    _, found, after = text.partition(f"| {corner} |")
    assert found
    lines = after.split("\n\n")[0].splitlines()[2:]
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]


def test_ablation_of_the_spectral_step() -> None:
    runs = result("spectral_step")["runs"]
    heading = "mean of two seeds, final training loss (held out)"
    for name, *cells in table_of("spectral_step.md", heading):
        for network, digits, cell in zip(
            ("characters", "autoencoder"), (3, 1), cells, strict=True
        ):
            key = f"{network}|{ABLATION.get(name, name)}"
            train, held_out = (
                sum(runs[f"{key}|{seed}"][field] for seed in (0, 1)) / 2
                for field in ("train", "held out")
            )
            assert cell == f"{train:.{digits}f} ({held_out:.{digits}f})", key


def test_layers_of_which_few_outputs_hold_most() -> None:
    runs = result("peers-shares")["runs"]
    wide = {
        (problem, name): share
        for problem, layers in runs.items()
        for name, (outputs, share) in layers.items()
        if outputs > 8
    }
    heads = {(key, "head") for key in ("transformer", "transformer128", "lstm")}
    assert {place for place, share in wide.items() if share > 0.5} == heads
    found = sorted(wide[place] for place in heads)
    others = max(share for place, share in wide.items() if place not in heads)
    text = " ".join((DOCS / "spectral_step.md").read_text(encoding="utf-8").split())
    assert f"the share is {found[0]:.3f} to {found[-1]:.3f} in the heads" in text
    assert f"at most {others:.2f} in any other" in text


def test_first_steps() -> None:
    losses = result("first_steps")["losses"]
    networks = ("siren", "variational", "bert")
    names = ("AdamW", "EKFAC", "EKFAC, of one length", "KFAC", "EKFAC, natural")
    rows = table_of("spectral_step.md", "| AdamW | EKFAC | of one length | KFAC")
    for network, (_, *cells) in zip(networks, rows, strict=True):
        runs = losses[network]
        for name, cell in zip(names, cells, strict=True):
            mean = sum(runs[name][140:150]) / 10
            digits = len(re.sub(r"e.*|\.|^0\.0*", "", cell))
            assert float(cell) == float(f"{mean:.{digits}g}"), (network, name)


def test_what_factors_show() -> None:
    whole = {
        (row["network"], row["matrix"]): row
        for row in result("factors_vs_exact")["rows"]
        if row["of"] == "whole"
    }
    fields = ("trace", "maximum", "T_10", "T_100", "erank", "d_eff")
    rows = table_of("curvature_matrices.md", "whole network")
    assert len(rows) == 7
    for name, *cells in rows:
        row = whole[tuple(name.split(", "))]
        for field, cell in zip(fields, cells, strict=True):
            digits = len(cell.partition(".")[2])
            assert cell == f"{row[field]:.{digits}f}", (name, field)
