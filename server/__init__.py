"""Find, prepare, run and stop a tritonserver."""
