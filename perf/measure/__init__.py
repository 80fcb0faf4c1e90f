"""What `python -m perf run` measures, a module each."""
