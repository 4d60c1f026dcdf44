"""The command as a user gives it: the whole comparison in small, killed, repeated, from a wheel."""
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--epochs", "2", "--eval-sets", "Glyphs,GlyphsV2"]


def carot(*words, cwd, **env):
    return subprocess.run([sys.executable, "-m", "carot.cli", *words], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300)

def stats(out): return {str(f.relative_to(out).parent): f.read_bytes() for f in sorted(Path(out).rglob("stats.tsv"))}

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    result = carot("reproduce", "--methods", "zs,lp,carot", *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout

def test_prints_tables_and_files(finished):
    folder, printed = finished
    assert "Avg. shifts" in printed and "report.ipynb" in printed and "carot" in printed
    for line in printed.splitlines():
        if line.startswith(("  expt_logs", "  /")): assert (folder/line.strip()).exists()
    assert not [line for line in printed.splitlines() if str(folder) in line]

def test_run_directory_is_complete(finished):
    runs = {p.parent.name: p for p in (finished[0]/"expt_logs"/"glyphs").glob("*/*") if (p/"config.json").exists()}
    assert sorted(runs) == ["carot", "lp", "zs"]
    assert runs["carot"].name == "epochs=2,eval_sets=Glyphs_GlyphsV2-" + runs["carot"].name.split("-")[1].split(",")[0] + ",seed=1"
    have = {str(f.relative_to(runs["carot"])) for f in runs["carot"].rglob("*") if f.is_file()}
    assert have >= {"run.ipynb", "config.json", "stats.tsv", "train.tsv", "metrics.tsv", "predictions/Glyphs.safetensors", "predictions/val.safetensors",
                    "student/open_clip_config.json", "student/open_clip_model.safetensors", "teacher/open_clip_model.safetensors"}
    assert not [f for f in have if "optimizer" in f or "checkpoint" in f]
    config = json.loads((runs["carot"]/"config.json").read_text())
    assert config["complete"] and config["parameters"]["epochs"] == 2 and {"versions", "git", "hardware", "started", "seconds"} <= config.keys()
    header = (runs["carot"]/"stats.tsv").read_text().splitlines()[0].split("\t")
    assert header == ["", "epoch", *(f"{s} {m}" for s in ("Glyphs", "GlyphsV2") for m in ("Accuracy", "ECE", "batched ECE")), "Avg ID carot Loss"]

def test_again_does_nothing(finished):
    before = {f: f.stat().st_mtime_ns for f in finished[0].rglob("*") if f.is_file() and "report" not in f.parts}
    assert carot("reproduce", "--methods", "zs,lp,carot", *SMALL, cwd=finished[0]).returncode == 0
    assert before == {f: f.stat().st_mtime_ns for f in finished[0].rglob("*") if f.is_file() and "report" not in f.parts}

def test_logits_give_the_logged_metrics(finished):
    import pandas as pd
    from carot.evaluate import load_predictions, metrics_table
    run = next((finished[0]/"expt_logs"/"glyphs"/"carot").iterdir())
    logged = pd.read_csv(run/"metrics.tsv", sep="\t").set_index(["set", "metric"]).value
    again = metrics_table(load_predictions(run), 250).set_index(["set", "metric"]).value
    pd.testing.assert_series_equal(logged.sort_index(), again.sort_index(), rtol=1e-12)

def test_killed_at_any_moment_ends_the_same(finished, tmp_path):
    "kill -9 of the whole command at growing delays until it gets through; the results are those of the uninterrupted one."
    for delay in (4, 7, 9, 11, 13, 300):
        process = subprocess.Popen([sys.executable, "-m", "carot.cli", "reproduce", "--methods", "zs,lp,carot", *SMALL], cwd=tmp_path,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        try:
            code = process.wait(delay)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.2)
    assert code == 0, process.stderr.read().decode()
    assert stats(tmp_path/"expt_logs"/"glyphs") == stats(finished[0]/"expt_logs"/"glyphs") and len(stats(tmp_path)) == 3

def test_two_at_once(tmp_path):
    words = [sys.executable, "-m", "carot.cli", "run", "--method", "ft", "--epochs", "3", "--eval-sets", "Glyphs"]
    both = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=300) for p in both]
    codes = sorted(p.returncode for p in both)
    assert codes in ([0, 2], [0, 0]), said  # the second waits a moment: it may find the run complete
    assert codes == [0, 0] or "another process" in "".join(err for _, err in said)
    assert len(stats(tmp_path)) == 1

def test_from_a_wheel_outside_the_clone(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT], check=True)
    zipfile.ZipFile(next(tmp_path.glob("carot-*.whl"))).extractall(tmp_path/"site")
    (tmp_path/"elsewhere").mkdir()
    code = "import carot, sys; assert 'site' in carot.__file__, carot.__file__; from carot.cli import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, "reproduce", "--methods", "zs", "--eval-sets", "Glyphs"], cwd=tmp_path/"elsewhere",
                            env=os.environ | {"PYTHONPATH": str(tmp_path/"site")}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path/"elsewhere"/"expt_logs"/"glyphs"/"report"/"report.ipynb").exists()
    assert (tmp_path/"site"/"carot"/"reported"/"reported.tsv").exists()
