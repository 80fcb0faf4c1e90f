"""The pages people look at: `report.html` and `analysis.html`, each one self-contained file."""
