"""The folder that Sphinx reads, and where the links of a page lead: to a page, a copied picture, or the repository."""
import os
import re
from configparser import ConfigParser
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\(([^)\s]+)\)")
PICTURES = (".png", ".jpg", ".svg")


@cache
def settings() -> dict[str, str]:
    "settings.ini."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def repository() -> str:
    "Address of the repository, from settings.ini."
    return settings().get("git_url") or "https://github.com/{user}/{repo}".format(**settings())


class Sources:
    "Pages as they are written; a file whose content is the same stays as it is, so that Sphinx does not read it again."
    def __init__(self, folder: Path):
        self.folder, self.written = folder, set()

    def write(self, name: str, content: str | bytes) -> None:
        "Write a page or a picture."
        file, data = self.folder/name, content.encode() if isinstance(content, str) else content
        self.written.add(file)
        if file.exists() and file.read_bytes() == data: return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def remove_others(self) -> None:
        "Remove what an earlier build wrote and this one did not."
        for file in self.folder.rglob("*"):
            if file.is_file() and file not in self.written: file.unlink()

    def picture(self, file: Path, page: str) -> str:
        "Copy a picture of the repository; its path from a page."
        name = f"pictures/{'-'.join(file.relative_to(ROOT).parts)}"
        self.write(name, file.read_bytes())
        return relative(name, page)


def relative(target: str, page: str) -> str:
    "The path of a page or file, from a page."
    return os.path.relpath(target, os.path.dirname(page) or ".").replace(os.sep, "/")


def with_links(
    text: str,  # Markdown
    place: Path,  # folder of the repository that its links are relative to
    page: str,  # name of the page among the sources
    where: dict[Path, str],  # file of the repository -> page
    sources: Sources,
) -> str:
    "The same text with links that hold on the site."
    def changed(match):
        picture, label, target = match.groups()
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not name: return match[0]
        file = (place/name).resolve()
        if not file.exists(): return match[0]  # Sphinx says so
        if picture: return f"![{label}]({sources.picture(file, page)})"
        if file in where: return f"[{label}]({relative(where[file], page)}{'#' + anchor if anchor else ''})"
        kind = "tree" if file.is_dir() else "blob"
        return f"[{label}]({repository()}/{kind}/{settings()['branch']}/{file.relative_to(ROOT).as_posix()})"
    parts = re.split(r"(```.*?```|`[^`\n]+`(?!\]))", text, flags=re.S)  # code is left alone, but for links' own labels
    return "".join(part if i % 2 else LINK.sub(changed, part) for i, part in enumerate(parts))
