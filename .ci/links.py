"""External links of the documentation: one that answers 404 or 410 is an error.

Other answers and links without an answer are printed. Without a network no link is
checked, which is no error.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

LINK = re.compile(r"""https?://[^\s<>()\[\]{}"'`\\]+""")
PLACES = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "csrc/*.md")
PLACES += ("ekfac/**/*.py", "examples/**/*.py", "examples/**/*.rst")
GONE = (404, 410)


def links(root: Path) -> dict[str, list[str]]:
    """Return every external link with the files that contain it."""
    by_link: dict[str, list[str]] = {}
    for place in PLACES:
        for path in sorted(root.glob(place)):
            text = path.read_text(encoding="utf-8")
            for link in {match.rstrip(".,;:") for match in LINK.findall(text)}:
                by_link.setdefault(link, []).append(str(path.relative_to(root)))
    return by_link


def answer(link: str) -> int | str:
    """Return the HTTP status, or why there is none."""
    request = Request(link, headers={"User-Agent": "Mozilla/5.0 (links of ekfac)"})
    try:
        with urlopen(request, timeout=20) as response:
            return int(response.status)
    except HTTPError as error:
        return error.code
    except (OSError, HTTPException) as error:
        return f"no answer ({error})"


def main(root: Path) -> int:
    """Print links that do not answer 200; return 1 if one of them is gone."""
    by_link = links(root)
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(by_link, pool.map(answer, by_link), strict=True))
    for link, found in answers.items():
        if found != 200:
            print(f"{link} in {', '.join(by_link[link])}: {found}")
    reached = sum(isinstance(found, int) for found in answers.values())
    gone = sum(found in GONE for found in answers.values())
    print(f"external links: {reached} of {len(answers)} answered, {gone} gone")
    if answers and not reached:
        print("no network: external links are not checked")
    return int(gone > 0)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
