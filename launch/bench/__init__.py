"""Benchmarks of time and memory: `python -m launch.bench {optimizer,train,memory,docs}`.

`timing.py` measures; `optimizer.py`, `train.py` with `parts.py`, and `memory.py` define what is
measured; `report.py` makes tables and plots, and `page.py` the page.
"""
