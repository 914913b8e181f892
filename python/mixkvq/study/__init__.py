"""What is measured on models: calibration, evaluation, and the laboratory of codecs. A library, that shows nothing on a terminal by itself."""
