"""The command line and the page it writes, of a checkpoint and of a script."""

from __future__ import annotations

import base64
import copy
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support import files_of_at_most
from torch import nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.__main__ import main
from ekfac.curvature.state import LayerCurvature
from ekfac.diagnostics import optimizer_health
from ekfac.diagnostics.health import assemble
from ekfac.report import SavedLayer, read_subject, render
from ekfac.report.page import compare, spectrum
from ekfac.report.report_input import subject_of

SCRIPT = """
import sys
import torch
import ekfac

torch.manual_seed(int(sys.argv[1]))
model = torch.nn.Sequential(
    torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
)
optimizer = ekfac.EKFAC(model)
monitor = ekfac.Monitor(optimizer, every=1, share=1.0)
x, y = torch.randn(40, 6), torch.randint(3, (40,))
for _ in range(5):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    monitor.log(loss=loss)
    optimizer.step()
data = [(x, y)]
"""


class Page(HTMLParser):
    """Counts tags and collects images, text and what a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.loads: list[str] = []
        self.text = ""
        self.depth: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "img":
            self.images.append(found)
        elif tag not in ("meta", "br"):
            self.depth.append(tag)
        self.loads += [str(v) for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def trained(kind: Any = ekfac.EKFAC, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(20, 6), nn.Flatten(), nn.Linear(18, 8), nn.LayerNorm(8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    optimizer = kind(model, **options)
    for _ in range(6):
        x, y = torch.randint(20, (16, 3)), torch.randint(3, (16,))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def check(page: Page) -> None:
    """Assert that a page is whole and needs no other file."""
    assert page.depth == []
    assert page.images
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    for image in page.images:
        assert image["alt"]
        drawn = base64.b64decode(str(image["src"]).partition(",")[2])
        root = ElementTree.fromstring(drawn)
        assert root.tag.endswith("svg")
        paths = [e for e in root.iter() if e.tag.endswith(("path", "use"))]
        assert len(paths) > 20, image["alt"]


@pytest.mark.parametrize("kind", [ekfac.EKFAC, ekfac.KFAC])
def test_checkpoint(
    kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = trained(kind)
    path, output = tmp_path / "run.pt", tmp_path / "page.html"
    nested = {"epoch": 3, "optimizer_states": [optimizer.state_dict()]}
    torch.save(nested, path)
    assert main(["report", str(path), "-o", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    page = read(output)
    check(page)
    # Two overviews, and one figure for each layer.
    assert len(page.images) == 2 + len(optimizer.curvature)
    assert "6 steps, 4 layers" in page.text
    assert "taken as adaptive" in page.text


def test_a_saved_optimizer_is_as_healthy_as_the_live_one(tmp_path: Path) -> None:
    optimizer = trained(damping_mode="absolute", damping=0.01)
    path = tmp_path / "run.pt"
    torch.save(optimizer.state_dict(), path)
    subject = read_subject(path, damping_mode="absolute")
    saved = assemble(subject.layers, subject.dampings, subject.steps, {})
    live = optimizer_health(optimizer)
    assert saved.steps == live.steps
    assert saved.bytes == live.bytes
    for mine, other in zip(saved.layers, live.layers, strict=True):
        for name, value in vars(other).items():
            found = getattr(mine, name)
            if name in ("layer", "block"):
                assert found == value
            elif name not in ("weight_norm", "update_norm", "update_share"):
                assert found == pytest.approx(value, rel=1e-5, nan_ok=True), name


def test_a_saved_layer_has_what_a_live_one_has() -> None:
    optimizer = trained()
    for name, layer in optimizer.curvature.items():
        saved = SavedLayer(name, layer.state_dict())
        for key in ("A", "G", "s", "Q_A", "Q_G", "eigenvalues_A", "eigenvalues_G"):
            mine, other = getattr(saved, key), getattr(layer, key)
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)
        assert saved.bytes() == layer.bytes()
        assert saved.version == layer.version
        assert isinstance(layer, LayerCurvature)


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, output = tmp_path / "train.py", tmp_path / "page.html"
    script.write_text(SCRIPT, encoding="utf-8")
    before = list(sys.argv), list(sys.path)
    assert main(["report", str(script), "-o", str(output), "--", "7"]) == 0
    assert (sys.argv, sys.path) == before
    page = read(output)
    check(page)
    alts = [str(image["alt"]) for image in page.images]
    assert "loss over the steps" in alts
    assert any("traces of K-FAC" in alt for alt in alts)
    assert any("alignment of the tangent kernel" in alt for alt in alts)
    for heading in ("Beside the data", "While training", "Layer by layer"):
        assert heading in page.text
    assert "0: Linear" in page.text
    capsys.readouterr()


def test_traces_beside_the_data_are_exact() -> None:
    """EKFAC's per-example trace of the same batch is the exact one; K-FAC's is not."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(64, 6).double(), torch.randint(3, (64,))
    optimizer = ekfac.EKFAC(
        model, lr=0.0, scaling="per_example", factor_decay=0.0, scaling_decay=0.0
    )
    cross_entropy(model(x), y).backward()
    optimizer.step()
    subject = subject_of(optimizer, data=[(x, y)], loss_fn=cross_entropy)
    found = compare(subject)
    assert found is not None
    assert found.kind == "empirical"
    assert found.examples == 64
    gradients = torch.zeros(2)
    for i in range(64):
        model.zero_grad()
        cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for place, layer in enumerate((model[0], model[2])):
            squares = (p.grad.square().sum() for p in layer.parameters())  # type: ignore[union-attr]
            gradients[place] += float(sum(squares)) / 64
    for expected, (_, exact, kfac, own) in zip(gradients, found.traces, strict=True):
        assert exact == pytest.approx(float(expected), rel=1e-5)
        assert own == pytest.approx(exact, rel=1e-8)
        assert abs(kfac / exact - 1) > 1e-3
    assert found.alignment is not None
    assert set(found.alignment.layers) == {"0", "2"}


def test_data_that_cannot_be_compared_are_noted() -> None:
    optimizer = trained()
    subject = subject_of(optimizer, data=[torch.randint(20, (8, 3))])
    page = Page(render(subject))
    assert "No exact traces: " in page.text
    assert "No alignment with the labels: " in page.text


def test_names_are_escaped() -> None:
    optimizer = ekfac.EKFAC(nn.Linear(3, 2))
    page = render(subject_of(optimizer, origin="<script>alert(1)</script>"))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_an_optimizer_without_steps() -> None:
    optimizer = ekfac.EKFAC(nn.Linear(3, 2))
    page = Page(render(subject_of(optimizer, origin="fresh")))
    assert "has done no step" in page.text
    assert page.depth == []


def test_spectra_are_thinned() -> None:
    ranks, values = spectrum(torch.arange(1, 100_001).double())
    assert len(ranks) <= 300
    assert int(ranks[0]) == 1
    assert int(ranks[-1]) == 100_000
    assert values[0] == 100_000
    assert torch.equal(values, 100_001 - ranks.double())


@pytest.mark.parametrize(
    ("content", "name", "match"),
    [
        (None, "none.pt", "is no file"),
        ("hello", "text.pt", "was not written by torch.save"),
        ({"weights": torch.ones(2)}, "other.pt", r"found \['weights'\]"),
        (nn.Linear(2, 2), "pickle.pt", "could run code of others"),
        ("x = 1", "script.py", "found none"),
        ("optimizer = 3", "script.py", "found int"),
    ],
)
def test_errors(
    content: Any,
    name: str,
    match: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif content is not None:
        torch.save(content, path)
    assert main(["report", str(path), "-o", str(tmp_path / "page.html")]) == 2
    assert re.search(match, capsys.readouterr().err)
    assert not (tmp_path / "page.html").exists()


MAIN = """
import sys
import torch
import ekfac

def main():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    optimizer = ekfac.EKFAC(model)
    y = torch.arange(8) % 3
    torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), y).backward()
    optimizer.step()
    return STATUS

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.parametrize("status", ["0", "None"])
def test_a_script_that_ends_in_sys_exit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    script, output = tmp_path / "train.py", tmp_path / "page.html"
    script.write_text(MAIN.replace("STATUS", status), encoding="utf-8")
    assert main(["report", str(script), "-o", str(output)]) == 0
    check(read(output))
    assert "1x3x5" in read(output).text
    capsys.readouterr()


def test_a_script_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, output = tmp_path / "train.py", tmp_path / "page.html"
    script.write_text(MAIN.replace("STATUS", "3"), encoding="utf-8")
    assert main(["report", str(script), "-o", str(output)]) == 2
    assert "status 3" in capsys.readouterr().err
    assert not output.exists()


def test_the_input_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "state.pt"
    torch.save(trained().state_dict(), checkpoint)
    before = checkpoint.read_bytes()
    link, hard = tmp_path / "link.html", tmp_path / "hard.html"
    link.symlink_to(checkpoint)
    hard.hardlink_to(checkpoint)
    for output in (checkpoint, link, hard, tmp_path / "." / "state.pt"):
        assert main(["report", str(checkpoint), "-o", str(output)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert checkpoint.read_bytes() == before


def test_a_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint, output = tmp_path / "state.pt", tmp_path / "page.html"
    torch.save(trained().state_dict(), checkpoint)
    output.write_text("old", encoding="utf-8")

    with files_of_at_most(1000):
        assert main(["report", str(checkpoint), "-o", str(output)]) == 2
    assert output.read_text(encoding="utf-8") == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "state.pt"]
    assert main(["report", str(checkpoint), "-o", str(output)]) == 0
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def damaged(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield states that are not as the optimizer saves them."""
    layer = next(iter(state["curvature"]))
    for key in ("A", "G_weight", "version", "eigenvalues_A"):
        wrong = copy.deepcopy(state)
        del wrong["curvature"][layer][key]
        yield wrong
    for key, value in (
        ("curvature", None),
        ("curvature", {layer: 3}),
        ("progress", {}),
    ):
        yield {**copy.deepcopy(state), key: value}
    wrong = copy.deepcopy(state)
    wrong["curvature"][layer]["A"] = torch.ones(1, 2, 2)
    yield wrong
    wrong = copy.deepcopy(state)
    wrong["param_groups"] = []
    yield wrong


def test_malformed_checkpoints_get_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = tmp_path / "state.pt", tmp_path / "page.html"
    for state in damaged(trained().state_dict()):
        torch.save(state, checkpoint)
        assert main(["report", str(checkpoint), "-o", str(output)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    torch.save(trained().state_dict(), checkpoint)
    whole = checkpoint.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        checkpoint.write_bytes(whole[:size])
        assert main(["report", str(checkpoint), "-o", str(output)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not output.exists()


def test_without_matplotlib_there_is_a_clear_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(trained().state_dict(), tmp_path / "run.pt")
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    output = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run.pt"), "-o", str(output)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not output.exists()


def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "report" in capsys.readouterr().out
