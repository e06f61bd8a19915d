"""Compiles the train step for a TPU slice without a TPU, and reports whether it fits.

    python -m launch.compile_tpu --topology v6e:1x1 --model_config configs/llama_7b.json \
        --batch_size 16 --optimizer galore_adamw8bit --proj_type continuous_adam8bit \
        --rank 1024 --basis_dtype bfloat16 --projector_init qr --per_layer

It takes the flags of launch.train_jax, builds the same step, and passes it to the TPU compiler,
which runs on a CPU: `pip install -e ".[jax,tpu]"`. Neither a TPU nor data are needed. It prints the
bytes of a chip that arguments, temporaries and the peak take, the operations of a step, and the
communication between chips. The exit code is 0 if the step fits, 1 if it does not, and 2 if the
compiler failed otherwise.

`--batch_size` is the number of rows of one process in one forward pass, as in training. A process
is a host of the slice, and hosts are assumed to have four chips, or the only chip.

`step` builds and compiles, `hlo` reads the communication, and `table` writes `docs/tpu.md`:
`python -m launch.compile_tpu.table`.
"""
