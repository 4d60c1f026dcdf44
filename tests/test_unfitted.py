"Where no temperature can be fitted, T is 1, and every table that shows it says so and why."
import json

import pandas as pd
import pytest

from carot.analysis import claims, tables
from carot.analysis.simulated import simulate_run
from carot.runs import records

WHY = "40 images are fewer than 100"


@pytest.fixture(scope="module", name="out")
def some_runs(tmp_path_factory):
    "Runs with too few images for a temperature, one with enough, and one that says itself that it has none."
    out = tmp_path_factory.mktemp("out")
    for method, n in [("carot", 40), ("ft", 40)]: simulate_run(out, method, benchmark="few", n=n)
    for method in ("carot", "ft"): simulate_run(out, method, benchmark="many", n=600)
    file = simulate_run(out, "zs-t", benchmark="few", n=40)/"config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"remark": f"no temperature is applied (T = 1): {WHY}"}))
    return out


def test_claims_have_a_dagger_and_a_column(out, tmp_path):
    table = claims.claims_table(out, "few", evidence=claims.Evidence(20))
    scaled = table.test.str.contains("scaled") & (table.verdict != "not run")
    assert scaled.any() and (table.unfitted[scaled] != "").all() and (table.unfitted[~scaled] == "").all()
    text = claims.write_claims(tmp_path, table)
    assert f"† No temperature could be fitted, T = 1: carot/seed=1: {WHY}; ft/seed=1: {WHY}." in text
    assert text.count("scaled† ") == scaled.sum()
    written = pd.read_csv(tmp_path/"claims.tsv", sep="\t", keep_default_na=False)
    assert list(written.unfitted) == list(table.unfitted)


def test_claims_have_none_where_all_are_fitted(out, tmp_path):
    table = claims.claims_table(out, "many", evidence=claims.Evidence(20))
    assert not any(table.unfitted) and "†" not in claims.write_claims(tmp_path, table)


@pytest.mark.parametrize("benchmark, marked", [("few", True), ("many", False)])
def test_the_table_of_temperatures(out, benchmark, marked):
    text = claims.temperature_markdown(records.find_runs(out, benchmark), claims.Evidence(20))
    assert ("1.0000†" in text) == (f"carot/seed=1: {WHY}" in text) == ("†" in text) == marked


def test_tables_of_a_report(out, tmp_path):
    runs, results = records.find_runs(out, "few"), tables.collect(out, "few")
    page = tables.write_table(tmp_path/"table", runs, results, "ece")
    words = f"zs-t/seed=1: no temperature is applied (T = 1): {WHY}."
    assert words in page and words in (tmp_path/"table.md").read_text() and words in (tmp_path/"table.tex").read_text()
    assert words in tables.html_page(results, "ece", tables.about(runs, "ece"))
    written = pd.read_csv(tmp_path/"table.tsv", sep="\t", index_col="method").remark.dropna()
    assert written.to_dict() == {"zs-t": words[13:-1]}
    tables.write_table(tmp_path/"other", *(f(out, "many") for f in (records.find_runs, tables.collect)), "ece")
    assert "remark" not in pd.read_csv(tmp_path/"other.tsv", sep="\t")
    assert "T = 1" not in (tmp_path/"other.md").read_text()
