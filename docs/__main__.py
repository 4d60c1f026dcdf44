"""Build the book as a site, offline: `python -m docs` writes docs/_build/html, and fails at any warning."""
import argparse
import http.server
import sys
import time
from functools import partial
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from docs import api, chapters, pages, sources  # noqa: E402


def build(out: Path) -> int:
    "Write all pages to out/source, and the site to out/html. Returns Sphinx's exit code."
    from sphinx.cmd.build import main as sphinx

    written = sources.Sources(out/"source")
    for write in (chapters.write, api.write, pages.write): write(written)
    written.remove_others()
    return sphinx(["-q", "-W", "--keep-going", "-b", "html", "-c", str(DOCS), "-d", str(out/"doctrees"),
                   str(out/"source"), str(out/"html")])


def serve(folder: Path, port: int) -> None:
    "Show it on this machine until Ctrl-C."
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        try: server.serve_forever()
        except KeyboardInterrupt: print()


parser = argparse.ArgumentParser(prog="python -m docs", description=__doc__)
parser.add_argument("--out", type=Path, default=DOCS/"_build", help="folder of the site; default docs/_build")
parser.add_argument("--serve", type=int, metavar="PORT", help="then show it at this port of this machine")
asked, start = parser.parse_args(), time.time()
code = build(asked.out.resolve())
files = [file for file in (asked.out/"html").rglob("*") if file.is_file()]
print(f"{asked.out/'html'/'index.html'}: {sum(file.suffix == '.html' for file in files)} pages, "
      f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB, {time.time() - start:.0f} s")
if code: sys.exit(code)
if asked.serve is not None: serve(asked.out/"html", asked.serve)
