"""How fast and how large: `python -m launch.bench {optimizer,train,memory,docs}`.

`timing.py` measures, `optimizer.py`, `train.py` and `memory.py` say what, `report.py` tells of it.
"""
