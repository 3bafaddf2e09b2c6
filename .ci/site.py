"""`python .ci/site.py SITE`: every link of the built site leads somewhere, and no page loads from another host."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    def __init__(self, file: Path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given.get("id"), given.get("name")}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        is_loaded = tag in ("img", "script", "iframe", "source") or given.get("rel") in (
            "stylesheet",
            "icon",
            "preload",
        )
        if is_loaded and (target := given.get("src") or given.get("href")):
            self.loaded.append(target)


def check(site: Path) -> list[str]:
    pages = {file: Page(file) for file in sorted(site.rglob("*.html"))}
    wrong = []
    for file, page in pages.items():
        for target in [*page.links, *page.loaded]:
            url = urlsplit(target)
            if url.scheme == "data" or (url.scheme and target not in page.loaded):
                continue
            there = (file.parent / unquote(url.path)).resolve() if url.path else file
            anchor = unquote(url.fragment)
            if url.netloc or not there.exists() or (anchor and there in pages and anchor not in pages[there].anchors):
                wrong.append(f"{file.relative_to(site)}: {target}")
    styles = [
        style for style in site.rglob("*.css") if re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text())
    ]
    return wrong + [f"{style.relative_to(site)} loads from another host" for style in styles]


if __name__ == "__main__":
    site = Path(sys.argv[1]).resolve()
    wrong = check(site)
    print(*wrong, f"{len(wrong)} wrong in {len(list(site.rglob('*.html')))} pages", sep="\n")
    sys.exit(bool(wrong))
