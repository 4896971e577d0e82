"""The inputs that the tests draw: HYPOTHESIS_PROFILE is 'ci', a few and always the same, or 'night', many new ones.

`@PROFILE` above `@given` has a test follow it. No drawing fails for the time that it takes, which is the machine's.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=3, derandomize=True, database=None, **UNTIMED)
settings.register_profile("night", max_examples=200, **UNTIMED)

NAME = os.environ.get("HYPOTHESIS_PROFILE") or "ci"
NIGHT = NAME == "night"
PROFILE = settings.get_profile(NAME)
night = pytest.mark.skipif(not NIGHT, reason="takes long: make night runs it")
