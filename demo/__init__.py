"""The whole road once, on shipped photographs: what `make demo` runs.

`__main__` runs the steps in order, each through the command a user would type; `serve` queries and
measures the server; `summary` derives the figures; `page` draws `index.html`. This folder stands
above all others: nothing imports it.
"""
