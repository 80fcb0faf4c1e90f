"""What single parts cost: scoring, `calibration fit` and `collect`, a change to a repository."""
