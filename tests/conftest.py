"""Settings of every test run."""

import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # Moshi reads it on import
# Also in the processes that tests start: a result must not depend on the number of threads, and
# two workers on two cores have no use for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

# A test result must not depend on the day: examples are derived from the test's name. For a search
# with fresh examples run `pytest --hypothesis-profile=search`.
slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", deadline=None, max_examples=30, derandomize=True, suppress_health_check=slow
)
settings.register_profile("search", deadline=None, max_examples=300, suppress_health_check=slow)
# For planted faults: finding one is enough, the smallest example is not needed.
settings.register_profile("mutants", settings.get_profile("ci"), phases=[Phase.generate])
settings.load_profile("ci")
