"""MixKVQ: `core` (format, profiles, settings), `study` (calibration, evaluation, the laboratory) and `cli` (commands); `bridge` runs models."""
