"""Install the hooks of git and of JupyterLab, once after cloning: `python tests/hooks.py`.

Git's are those of .pre-commit-config.yaml. JupyterLab's belongs to this environment: a notebook of a project whose
settings.ini has `jupyter_hooks = True` is saved without counts of execution and an editor's metadata, as nbdev_clean
leaves it. So what `git diff` shows after open, run and save is new code and new outputs."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path(sys.prefix)/"etc"/"jupyter"/"jupyter_server_config.py"
HOOK = """\
def clean_notebook(model, path, contents_manager, **_):
    "What carot's tests/hooks.py installed: nbdev_clean for the notebook that is saved."
    import os
    from nbdev.clean import clean_jupyter
    file = os.path.join(contents_manager.root_dir, path.strip("/"))
    if os.path.exists(file): clean_jupyter(file, model)  # not yet when it is new

c.ContentsManager.pre_save_hook = clean_notebook
"""


def install_in_jupyter(config: Path = CONFIG) -> None:
    "JupyterLab of this environment reads the file when it starts."
    content = config.read_text(encoding="utf-8") if config.exists() else ""
    if HOOK in content: return
    if "pre_save_hook" in content: sys.exit(f"{config}: another pre_save_hook is there; remove it")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(content + HOOK, encoding="utf-8")


if __name__ == "__main__":
    install_in_jupyter()
    subprocess.run([sys.executable, "-m", "pre_commit", "install"], cwd=ROOT, check=True)
