"""The whole road once, on shipped photographs: what `make demo` runs.

`__main__` goes one of the `roads`, two resolutions or a plan, by `steps`, each a command a user
would type; `run` then serves, asks and measures with the harness of `perf`; `show` tells it on the
terminal and on a page. This folder stands above all others: nothing imports it.
"""
