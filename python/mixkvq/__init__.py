"""The offline half of MixKVQ: the page format in NumPy, calibration, bit allocation, profiles and evaluation."""
