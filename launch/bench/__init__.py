"""How fast and how large: `python -m launch.bench {optimizer,train,memory,docs}`.

`timing.py` measures, `optimizer.py`, `train.py` with `parts.py`, and `memory.py` say what, and
`report.py` tells of it, on a page by `page.py`.
"""
