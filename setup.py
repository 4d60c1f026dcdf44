"""Reads settings.ini; the wheel also carries what `carot.core.shipped` finds."""
import json
import re
from configparser import ConfigParser
from pathlib import Path
from shutil import copy2

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
repository = cfg.get("git_url") or f"https://github.com/{cfg['user']}/{cfg['repo']}"

# files of the clone that the wheel carries below carot/shipped: the book, and all that a notebook of it reads
SHIPPED = """nbs/**/[!._]*.ipynb speed/*.tsv expt_logs/reported/* expt_logs/reference/glyphs/claims/claims.md
expt_logs/reference/glyphs/report/table[23].md expt_logs/reference/glyphs/*/*/config.json
expt_logs/reference/glyphs/*/*/metrics.tsv""".split()
CLASSIFIERS = """
Development Status :: 4 - Beta
Environment :: Console
Framework :: Jupyter
Intended Audience :: Science/Research
Natural Language :: English
Operating System :: OS Independent
Programming Language :: Python :: 3
Programming Language :: Python :: 3.11
Programming Language :: Python :: 3.12
Programming Language :: Python :: 3.13
Topic :: Scientific/Engineering :: Artificial Intelligence
Topic :: Scientific/Engineering :: Image Recognition
Typing :: Typed
"""


def with_absolute_links(text):
    "The README as a package index shows it, where its files are not beside it."
    def absolute(found):
        picture, label, target = found.groups()
        return f"{picture}[{label}]({repository}/{'raw' if picture else 'blob'}/{cfg['branch']}/{target})"
    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, text)


def without_outputs(text):
    "A notebook without what its execution makes, with which the wheel would be three times as large."
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=None)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


class BuildWithNotebooks(build_py):
    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return  # an editable install reads them from the clone
        for file in sorted(file for pattern in SHIPPED for file in Path().glob(pattern)):
            if any(part.startswith(".") for part in file.parts): continue
            target = Path(self.build_lib) / cfg["lib_name"] / "shipped" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            copy2(file, target)
            if file.suffix == ".ipynb":
                target.write_text(without_outputs(file.read_text(encoding="utf-8")), encoding="utf-8")


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=with_absolute_links(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=repository,
    project_urls={"Source": repository, "Changes": f"{repository}/blob/{cfg['branch']}/CHANGELOG.md",
                  "Paper": "https://arxiv.org/abs/2311.01723"},
    license_expression="Apache-2.0",
    classifiers=CLASSIFIERS.strip().splitlines(),
    keywords=cfg["keywords"],
    packages=find_packages(include=["carot", "carot.*"]),
    package_dir={"": "."},  # an editable install is then a path: `import carot` works in the clone's parent folder, too
    package_data={"carot": ["py.typed", "weights/*/*"]},
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "handwriting": cfg["handwriting_requirements"].split(),
        "ray": cfg["ray_requirements"].split(),
        "docs": cfg["docs_requirements"].split(),
        "browser": cfg["browser_requirements"].split(),
        "dev": cfg["dev_requirements"].split() + cfg["docs_requirements"].split(),
    },
    entry_points={"console_scripts": [cfg["console_scripts"]]},
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
