"""The documentation: pages of the gallery run, code blocks too, names exist."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import runpy
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import matplotlib.pyplot as plt
import pytest
import torch

import ekfac

ROOT = Path(__file__).resolve().parent.parent
DOCS, GALLERY = ROOT / "docs", ROOT / "examples" / "gallery"
PAGES = sorted(GALLERY.glob("plot_*.py"))
ROLE = re.compile(
    r":(?:class|func|meth|mod|attr|data|exc):`[^`<]*?<?~?(ekfac[\w.]*)>?`"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_of_the_gallery_ends_in_a_picture(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "optim.Muon" in page.read_text() and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon")
    monkeypatch.chdir(tmp_path)
    plt.close("all")
    runpy.run_path(str(page), run_name="__main__")
    figures = [plt.figure(number) for number in plt.get_fignums()]
    drawn = [axes for figure in figures for axes in figure.axes if axes.has_data()]
    plt.close("all")
    assert drawn


def test_the_gallery_has_fifteen_pages_or_more() -> None:
    assert len(PAGES) >= 15


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_code_of_a_page_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        if page.stem == "index":  # the one line that an AdamW user changes
            namespace["model"] = importlib.import_module("torch").nn.Linear(3, 2)
        exec(compile(block, page.name, "exec"), namespace)
    assert "```python" not in text or blocks


def modules() -> list[str]:
    """Return the names of the package's modules."""
    found = pkgutil.walk_packages(ekfac.__path__, "ekfac.")
    return ["ekfac", *(m.name for m in found if not m.name.endswith("__main__"))]


def exists(name: str) -> bool:
    """Return whether a dotted name can be reached by imports and attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ".".join(parts[:count])
        try:
            value = importlib.import_module(path)
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(value, part):  # a field, or set by the constructor
                fields = getattr(value, "__dataclass_fields__", {})
                return part in fields or any(
                    f"self.{part}" in inspect.getsource(parent)
                    for parent in getattr(value, "__mro__", ())
                    if parent.__module__.startswith("ekfac")
                )
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("module", modules())
def test_names_that_docstrings_refer_to_exist(module: str) -> None:
    source = inspect.getsource(importlib.import_module(module))
    missing = {name for name in ROLE.findall(source) if not exists(name)}
    assert not missing


@pytest.mark.parametrize(
    "page",
    [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "csrc" / "README.md"],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_modules_and_files_that_pages_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parts = "optim|curvature|layers|kernels|matrices|estimate|diagnostics|continual"
    names = re.findall(rf"`(?:ekfac\.)?((?:{parts})\.[a-z_]+[\w.]*)`", text)
    files = re.findall(r"`((?:ekfac|tests|benchmarks|examples)/[\w/]+\.\w+)`", text)
    assert not [n for n in names if not exists(f"ekfac.{n}") and not n.endswith(".py")]
    assert not [name for name in files if not (ROOT / name).exists()]


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(
        path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")
    )
    documented: set[int] = set()
    for match in re.finditer(r"automodule:: ([\w.]+)\n((?: +:.*\n)*)", pages):
        module = importlib.import_module(match[1])
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__
        ]
        documented |= {id(getattr(module, name)) for name in names}
    public = ("", ".optim", ".matrices", ".spectral", ".continual", ".layers")
    public += (".diagnostics", ".diagnostics.hessian", ".diagnostics.tangent_kernel")
    for part in public:
        module = importlib.import_module(f"ekfac{part}")
        for name in module.__all__:
            assert id(getattr(module, name)) in documented, f"ekfac{part}.{name}"
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"ekfac{part}.{name}"


def test_every_part_of_the_package_is_in_the_page_on_how_it_works() -> None:
    text = (DOCS / "how_it_works.md").read_text(encoding="utf-8")
    parts = [path for path in (ROOT / "ekfac").iterdir() if path.name[0] not in "_."]
    names = [p.name + "/" * p.is_dir() for p in parts if p.suffix in ("", ".py")]
    assert not [name for name in names if name not in text]


# -- links -----------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    """Answers with the status that the path names."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """Yield a server on a free port of this machine."""
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Answers) as served:
        thread = Thread(target=served.serve_forever)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def test_external_links_that_are_gone_fail(
    server: HTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / ".ci" / "links.py"))["main"]
    address = f"http://127.0.0.1:{server.server_port}"
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(f"See [it]({address}/200), <{address}/503>.")
    assert main(tmp_path) == 0
    assert f"{address}/503 in docs/page.md: 503" in (printed := capsys.readouterr().out)
    assert "2 of 2 answered, 0 gone" in printed
    (tmp_path / "README.md").write_text(f"- `{address}/404`; {address}/200.")
    assert main(tmp_path) == 1
    assert f"{address}/404 in README.md: 404" in capsys.readouterr().out


def test_without_a_network_no_link_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    module = runpy.run_path(str(ROOT / ".ci" / "links.py"))
    (tmp_path / "README.md").write_text("[a](http://127.0.0.1:1/404)")  # none listens
    assert module["main"](tmp_path) == 0
    assert "no network: external links are not checked" in capsys.readouterr().out


def test_pages_and_headings_that_the_readme_links_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "csrc" / "README.md"):
        text = page.read_text(encoding="utf-8")
        for target, heading in re.findall(r"\]\(([^)#:]*)#?([^)]*)\)", text):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(
                    r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M
                )
                assert heading in {t.lower().replace(" ", "-") for t in titles}, heading
