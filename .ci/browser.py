"""`python .ci/browser.py SITE`: every page in headless Chromium without a network, 390 and 1280 pixels wide.

Pictures load, formulas have a size, and nothing makes a page wider than its screen. Needs `chromium` on
PATH (Debian: `apt install chromium`); nothing else here does, so .ci/run leaves it to people.
"""

import functools
import html
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

WIDTHS = (390, 1280)
# Loads the pages one after the other in a frame and writes what it finds into itself.
HARNESS = """<pre id="found"></pre><script>
const found = [], pages = PAGES, widths = WIDTHS;
async function look(page, width) {
  const say = (what) => found.push(`${page} (${width}): ${what}`);
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = page;
  document.body.append(frame);
  await new Promise((done) => { frame.onload = done; });
  const there = frame.contentDocument, article = there.querySelector("article");
  if (!there.body.innerText.trim()) say("nothing to read");
  for (const picture of there.images) {
    picture.loading = "eager";
    await picture.decode().catch(() => say(`${picture.getAttribute("src")} does not load`));
  }
  for (const formula of there.querySelectorAll("math")) {
    const box = formula.getBoundingClientRect();
    if (!(box.width > 3 && box.height > 3)) say(`a formula without size: ${formula.textContent}`);
  }
  const scrolls = (e) => e !== article && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
  const over = [...article.querySelectorAll("*")].filter((e) => e.getBoundingClientRect().right > width && !scrolls(e));
  if (over.length) say(`wider than the screen: ${over[0].outerHTML.slice(0, 200)}`);
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of widths) await look(page, width);
  document.getElementById("found").textContent = JSON.stringify({looked: pages.length, found});
})();
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    pages: tuple[str, ...] = ()

    def do_GET(self):
        if self.path != "/look":
            return super().do_GET()
        body = HARNESS.replace("PAGES", json.dumps(self.pages)).replace("WIDTHS", json.dumps(WIDTHS)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def look(site: Path) -> dict:
    Handler.pages = tuple(
        str(page.relative_to(site)) for page in sorted(site.rglob("*.html")) if "_modules" not in str(page)
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--virtual-time-budget=120000"]
    address = f"http://127.0.0.1:{server.server_port}/look"
    run = subprocess.run(
        ["chromium", *options, offline, "--dump-dom", address], capture_output=True, text=True, timeout=300
    )
    server.shutdown()
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', run.stdout, re.S)
    return json.loads(html.unescape(found))


if __name__ == "__main__":
    result = look(Path(sys.argv[1]).resolve())
    print(*result["found"], f"{len(result['found'])} wrong in {result['looked']} pages", sep="\n")
    sys.exit(bool(result["found"]))
