"""Adaptation: training a cheap graph, without labels, to answer as the full model on one's images.

`request` (what is wanted) -> `teacher` (what the full model answers for views of the images, kept
on disk) -> `objective` (how far a student's answers are from those) -> `training` (steps, held-out
answers, early stopping) -> `distil` (the road through all of them, which writes the state
that `bundle.adapted` reads). `resuming` goes on with a training that was stopped, `halting` is what
training does besides where tokens halt, `device` where it runs.
"""
