"""Compares methods of training, each tuned by as many trials: `python -m launch.compare`.

`methods` names what is compared, `runs` trains and keeps what was found in a file of the
repository, `tune` searches and confirms, `state` counts what each method keeps, `report` writes the
page and its pictures.
"""
