"""`make gpu`: everything that can be proved on a GPU, part by part, into one results file.

`driver` runs the parts, each in processes that `process` supervises by their `lines`, and `store` keeps what they find:
nothing but Python's own library. `schedule` has the limits of the parts, `parts` their commands, `dry` those without a
GPU; `build` makes the package importable where nothing is installed; `pack` makes and unpacks what travels to
a machine with a GPU; `tools` reads what pytest, compute-sanitizer and ncu say; `measure` measures and `shard` tests, in
processes of their own; `sections` and `bars` render.
"""
