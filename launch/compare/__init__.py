"""Compares training methods, each tuned with the same number of trials: `python -m launch.compare`.

`methods` lists the methods, `runs` trains and stores results in a file of the repository, `tune`
searches and confirms, `state` counts the optimizer state of each method, `report` writes the page
and its figures.
"""
