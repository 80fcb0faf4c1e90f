"""The pages people look at: `report.html`, `analysis.html` and `plan.html`, each self-contained."""
