"""What hard tests share: one place, made once; how many examples Hypothesis tries."""
import hypothesis
import pytest
from hard.place import digests, make_place

COMMON = dict(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("few", max_examples=40, derandomize=True, **COMMON)
hypothesis.settings.register_profile("long", max_examples=3000, **COMMON)
hypothesis.settings.load_profile("few")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    "To be copied; whoever changes it is found out in the end."
    folder = make_place(tmp_path_factory.mktemp("hard")/"place")
    before = digests(folder)
    yield folder
    assert digests(folder) == before
