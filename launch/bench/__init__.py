"""Benchmarks of time and memory: `python -m launch.bench {optimizer,model,train,memory,docs}`.

`timing` measures; `optimizer` times one step of each `contender`, which `in_torch` and `in_jax`
build, and `model` a step on all matrices of a model; `train` with `parts` times the whole train
step, and `memory` counts bytes. `report` makes tables and plots, and `page` a page, whose text is
`page.md`.
"""
