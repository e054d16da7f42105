"""`make study-real`: does the window that `ppg-fast compare --env` predicts train a real language model best?

`dialogue` is the environment and `judge` the fitted half of its verdicts; `prediction` measures the window and writes
the line that is registered; `cells` trains, a process a cell; `section` renders.
"""
