"""Settings of all tests.

Property tests draw the same examples on every machine and at any speed. The width of a terminal is that of
none, whoever runs the tests. Torch computes in one thread, since several tests run side by side: threads that
spin while they wait for a core made some of them ten times slower. OMP_NUM_THREADS overrides it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded
os.environ.pop("COLUMNS", None)  # pytest-xdist tells its workers that of its own terminal

settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fixed")
