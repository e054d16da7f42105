"""`make gpu`: everything that can be proved on a GPU, part by part, into one results file.

`driver` runs the parts and needs nothing but Python's own library; `build` makes the package importable where nothing
is installed; `pack` makes and unpacks what travels to a machine with a GPU; `tools` reads what pytest,
compute-sanitizer and ncu say; `measure` measures, in processes of their own;
`sections` and `bars` render.
"""
