"""The Locust load test in perf/locustfile.py: nothing but that may import `users`."""
