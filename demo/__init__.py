"""The whole road once, on shipped photographs: what `make demo` runs."""
