"""How the threads of OpenMP wait. Import this module before PyTorch: libgomp reads its environment when it is loaded.

libgomp, which comes with PyTorch's wheels on Linux, lets a thread that waits at a barrier spin 300,000 times (several
milliseconds) before it sleeps. Where other processes run, the thread it waits for is often not on a core, and the
spinning one takes the core that it needs: training collapses. A thread with a bounded spin gives up its core in time
(`benchmarks.contention`).
"""

import os

SPINS = "1000"  # scripts/_env.sh sets the same


def bound_spinning() -> None:
    """Bound the spins of libgomp's threads, unless the user has said how they wait."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


bound_spinning()
