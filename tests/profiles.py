"""The inputs that the tests draw: HYPOTHESIS_PROFILE is 'ci', a few and always the same, or 'night', many new ones.

`@PROFILE` above `@given` has a test follow it.
"""

import os

import pytest
from hypothesis import settings

settings.register_profile("ci", max_examples=3, derandomize=True, database=None, deadline=None)
settings.register_profile("night", max_examples=200, deadline=None)

NAME = os.environ.get("HYPOTHESIS_PROFILE") or "ci"
NIGHT = NAME == "night"
PROFILE = settings.get_profile(NAME)
night = pytest.mark.skipif(not NIGHT, reason="takes long: make night runs it")
