"""What single parts cost, timed alone: scoring, `calibration fit`, `calibration collect`."""
