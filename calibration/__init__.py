"""Calibration: run both rungs offline, fit the score, choose the threshold, write the artifact."""
