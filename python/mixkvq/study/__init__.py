"""What is measured on models: calibration, evaluation, and the laboratory of codecs. A library, that shows nothing on a terminal by itself."""

import os

# Before OpenMP is loaded: on a machine that has other work, threads that spin for each other take twice as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
