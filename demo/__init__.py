"""The whole road once, on shipped photographs: what `make demo` runs.

`__main__` goes one of the `roads`, two resolutions or a plan, by `steps`, each a command a user
would type; `run` then serves (`systems`), asks and measures one request at a time (`serve`) and, of
a plan, saturated; `summary` and `plan_summary` derive the figures; `tables` and
`page` show them. This folder stands above all others: nothing imports it.
"""
