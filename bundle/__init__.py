"""What lies on disk between export and calibration: which images something was fitted on."""
