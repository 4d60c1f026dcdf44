"""Look at the built site in a headless Chromium: `python docs/browse.py [--all] [--shots FOLDER]`, after
`python -m docs`.

Start page, a search, a chapter, a report, a method and a recipe on a desktop and on a phone: no error in the console,
no request to another host, nothing wider than the page, no finding of axe-core. With --all every page; those beside
the first are shown to axe on the desktop only. Needs `pip install -e ".[browser]"` and Debian's chromium (or CHROMIUM,
the path of one). Exit code 0: all well, 1: findings, 77: there is no browser."""
import argparse
import contextlib
import http.server
import os
import re
import shutil
import sys
import threading
from functools import partial
from pathlib import Path

SITE = Path(__file__).resolve().parent/"_build"/"html"
WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}
PAGES = {"start": "index.html", "chapter": "1_method/07_calibration.html", "losses": "1_method/04_losses.html",
         "report": "results/glyphs.html", "method": "methods/carot.html", "api": "api/carot.losses.html",
         "recipe": "recipes/own_images.html"}
DARK = ("losses", "api")  # the others differ in nothing
WHOLE = ("losses", "api")  # where colours of code and formulas are looked at
PLAIN = "document.querySelectorAll('pre, math').forEach(found => found.replaceChildren(found.textContent))"
RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]},
         "resultTypes": ["violations"]}  # of the others one element each


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Files of a folder, without a line for each."
    def log_message(self, *_): pass

    def copyfile(self, *given):
        "A browser that turns to the next page hangs up."
        with contextlib.suppress(ConnectionError): super().copyfile(*given)


def chromium() -> str | None:
    "Path of a browser, if there is one."
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def left_out(why: str) -> None:
    "Say so, and stop."
    print(f"browser checks left out: {why}")
    sys.exit(77)


def findings_of_axe(page, axe) -> list[str]:
    "What axe-core finds, a line each."
    found = axe.run(page, options=RULES).response["violations"]
    return [f"axe {one['id']} ({one['impact']}), {len(one['nodes'])} times: {one['help']}; first "
            f"{one['nodes'][0]['target']}" for one in found]


def search(page) -> list[str]:
    "Look for ECE as a reader does."
    page.wait_for_selector("#search-results ul.search li", timeout=15000)
    page.wait_for_load_state("networkidle")  # what is quoted of each page comes later
    titles = page.locator("#search-results ul.search li a").all_text_contents()
    return [] if any("calibration" in title.lower() or "ece" in title.lower() for title in titles) else [
        f"nothing of use among the results for ECE: {titles[:5]}"]


def look(page, name: str, address: str, axe, heard: list[str], shot: Path | None) -> list[str]:
    "Open one page and say what is wrong with it."
    heard.clear()
    page.goto(address, wait_until="load")
    found = search(page) if name == "search" else []
    page.wait_for_timeout(300)
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    if wide > 1: found.append(f"{wide} pixels wider than the page")
    missing = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
    found += [f"no picture at {source}" for source in missing]
    if shot: page.screenshot(path=shot)
    if axe and name not in WHOLE: page.evaluate(PLAIN)  # a chapter has ten thousand pieces of code, of the same colours
    return found + heard + (findings_of_axe(page, axe) if axe else [])


def every_page(site: Path) -> dict[str, str]:
    "All pages, by their addresses."
    found = [file.relative_to(site).as_posix() for file in sorted(site.rglob("*.html"))]
    return {name: name for name in found if not name.startswith("_static/") and name not in PAGES.values()}


def visit(browser, root: str, axe, addresses: dict[str, str], shots: Path | None) -> int:
    "Pages at all widths, light, and some dark; how many findings."
    count, shown = 0, (*PAGES, "search")
    for width, (x, y) in WIDTHS.items():
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": x, "height": y}, color_scheme=scheme)
            heard: list[str] = []
            page.on("console", lambda m: heard.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: heard.append(f"error: {error}"))
            page.on("request", lambda r: None if r.url.startswith((root, "data:", "blob:")) else heard.append(
                f"asks {r.url}"))
            for name, address in addresses.items():
                if scheme == "dark" and name not in DARK: continue
                shot = shots/f"{name}-{width}-{scheme}.png" if shots and name in shown else None
                twice = width == "phone" and name not in shown
                found = look(page, name, f"{root}/{address}", None if twice else axe, heard, shot)
                count += len(found)
                print(f"{name}, {width}, {scheme}: {'; '.join(found) or 'well'}", flush=True)
            page.close()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--site", type=Path, default=SITE, help="folder of the built site")
    parser.add_argument("--shots", type=Path, help="folder for pictures of the screen")
    parser.add_argument("--all", action="store_true", help="every page, and not only one of each kind")
    parser.add_argument("--match", metavar="PATTERN", default="", help="only pages whose name and address fit this")
    asked = parser.parse_args()
    if not (asked.site/"index.html").exists(): sys.exit(f"{asked.site} holds no site: `python -m docs` builds it")
    if not (path := chromium()): left_out("no Chromium here; `apt-get install chromium`, or set CHROMIUM to one")
    try:
        from axe_playwright_python.sync_playwright import Axe
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError: left_out('Playwright is missing; `pip install -e ".[browser]"`')
    if asked.shots: asked.shots.mkdir(parents=True, exist_ok=True)
    addresses = {**PAGES, "search": "search.html?q=ECE"} | (every_page(asked.site) if asked.all else {})
    addresses = {name: address for name, address in addresses.items() if re.search(asked.match, f"{name} {address}")}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=asked.site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
            count = visit(browser, f"http://127.0.0.1:{server.server_port}", Axe(), addresses, asked.shots)
            browser.close()
        server.shutdown()
    print(f"{count} findings")
    sys.exit(bool(count))


if __name__ == "__main__": main()
