"""The planner: which cheap and which full rung, by which signal, are cheapest with a certificate.

`request` (what may be combined) -> `checks` (can the model, are the images enough?) -> `graphs`
(exported and aligned, by a `workshop`) -> `parts` (which image plays which part, what graphs answer
for it) -> `select` (shortlist on the fit split, certify, choose), perhaps `adapting` (train what is
on the shortlist) before the test -> `plan` (the road through all of them) -> `result` (plan.json).
`study` and `simulation` plan many times, to compare ways.
"""
