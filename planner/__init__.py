"""The planner: which cheap and which full rung, by which signal, are cheapest with a certificate.

`candidates` (what may be combined) -> `shelf` (graphs exported and aligned, by `subprocesses`) ->
`graph_outputs`, `answers` (what each graph answers) -> `select` (shortlist on the fit split,
certify, choose) -> `plan` (the road through all of them) -> `result` (plan.json).
"""
