"""Property tests draw the same examples in every run, unless HYPOTHESIS_PROFILE says `explore`."""

import os

from hypothesis import HealthCheck, settings

# Before torch is imported. Threads that wait busily wait many times as long when another process has the core; and
# where each core has its own tests, threads only stand in their way.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
