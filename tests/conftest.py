"""Property tests draw the same examples in every run, unless HYPOTHESIS_PROFILE says `explore`."""

import os

from hypothesis import HealthCheck, settings

# Threads that wait busily wait many times as long when another process has the core. Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
