"""Recipes: the ways in which a graph of the model makes itself cheap.

`bundle.recipe` reads and writes their text, such as `px=112,int8=static,align`. `smaller`,
`token_merging`, `patch_sizes` and `halting` change the torch model before it is exported;
`quantise` and `half` change the exported graph, and so does `export.align`.
"""
