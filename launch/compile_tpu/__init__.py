"""Compiles the train step for a TPU that is not there, and says whether it fits.

    python -m launch.compile_tpu --topology v6e:1x1 --model_config configs/llama_7b.json \
        --batch_size 16 --optimizer galore_adamw8bit --proj_type continuous_adam8bit \
        --rank 1024 --basis_dtype bfloat16 --projector_init qr --per_layer

It takes the flags of launch.train_jax, builds the very step that would run, and hands it to the TPU
compiler, which runs on a CPU: `pip install -e ".[jax,tpu]"`. Needed are neither a TPU nor data.
Printed are the bytes of a chip that arguments, temporaries and the peak take, the operations of a
step, and what the chips send each other. The exit code is 0 where the step fits, 1 where it does
not, and 2 where the compiler could not say.

`--batch_size` is the rows of one process in one forward pass, as in training. A process is a host
of the slice, and hosts are taken to have four chips, or the one that there is.

`step` builds and compiles, `hlo` reads what the chips exchange, and `table` writes `docs/tpu.md`:
`python -m launch.compile_tpu.table`.
"""
