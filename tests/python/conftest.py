"""What holds for all tests: the same examples in every run, threads that leave the processor to others while they wait, and Ctrl-C."""

import os
import signal

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# Before OpenMP is loaded, and for the processes that tests start: threads that spin for each other stand still where two tests share a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# NumPy's products, before NumPy is loaded: a thread of OpenBLAS that has no core of its own holds up the other for its whole time slice.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shell ignores Ctrl-C for what it runs in the background, and so would the tests and the programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# So does nohup for a terminal that is closed. A handler that does nothing is not inherited; deafness is.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

os.environ["MIXKVQ_CONFIG"] = ""  # no settings file of the user's
os.environ["XDG_DATA_HOME"] = os.devnull  # nothing is kept in the user's folder, unless a test names one: so no calibration is offered, either

# Hypothesis draws the constants of every module that is loaded, too: examples would hang on which tests ran in a process before.
providers.is_local_module_file = lambda path: False

# A run draws the examples of the run before, so that what failed fails again; and no example fails because the machine is busy.
unchecked = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("mixkvq", derandomize=True, deadline=None, suppress_health_check=unchecked)
settings.load_profile("mixkvq")
