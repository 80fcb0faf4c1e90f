"""Recipes: the ways in which a graph of the model makes itself cheap, each in a module of its own.

`recipe` reads and writes their text, such as `px=112,int8=static,align`. `resize`, `depth` and
`token_merging` change the torch model before it is exported; `quantise`, `half` and `align` change
the exported graph.
"""
