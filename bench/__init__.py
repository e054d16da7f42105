"""The benchmark harness: who computes (providers, peers) what (problem) against which limit (ceilings), how fast, in
how much memory.

`python -m ppg_fast.bench` measures, `python -m ppg_fast.bench --render` writes the numbers into the documents. One
`bench_<op>.py` per op.
"""
