"""Parts of the Locust load test in perf/locustfile.py, a subject each.

`users` and `lifecycle` import Locust, which replaces Python's own threads and sockets by gevent's
as it is imported: nothing but the locustfile may import those two.
"""
