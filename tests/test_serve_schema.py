"""The short form of what `scripts/robustness fuzz` does at length: cases generated from the description."""

from fuzz_schema import fuzz_schema
from serving import serving, until

from gpt2core.testing import random_checkpoint


def test_cases_from_the_description_are_answered_as_described(tmp_path):
    folder = str(random_checkpoint(tmp_path, n_positions=32))
    with serving(model=folder) as server:
        statuses = fuzz_schema(server.url, 100)
        assert max(statuses) < 500
        assert {200, 400, 422} <= set(statuses)
        until(server.idle)
        server.check_works()
