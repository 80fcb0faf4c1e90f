"""The page people look at: `report.html`, one summary.json in one self-contained file."""
