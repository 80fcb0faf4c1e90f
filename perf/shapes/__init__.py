"""How the number of Locust users changes over a run, a shape per file."""
