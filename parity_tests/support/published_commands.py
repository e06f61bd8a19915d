"""The published commands."""

PUBLISHED_60M = """--model_config configs/llama_60m.json --lr 0.01 --galore_scale 0.25 --rank 128
    --update_proj_gap 200 --batch_size 256 --total_batch_size 512 --num_training_steps 10000
    --warmup_steps 1000 --weight_decay 0 --dtype bfloat16 --eval_every 1000
    --optimizer galore_adamw --proj_type continuous"""
PUBLISHED_7B_GALORE = """--model_config configs/llama_7b.json --lr 0.005 --galore_scale 0.25
    --rank 1024 --update_proj_gap 500 --batch_size 16 --total_batch_size 512
    --activation_checkpointing --num_training_steps 150000 --warmup_steps 15000 --weight_decay 0
    --grad_clipping 1.0 --dtype bfloat16 --eval_every 1000 --single_gpu
    --optimizer galore_adamw8bit_per_layer"""
PUBLISHED_7B = PUBLISHED_7B_GALORE + " --proj_type continuous_adam8bit"
