"""Stage 2: from encoded shards to a LoRA.

launch.py       the driver: caches what is missing, starts Ray Train, hands back the LoRA
watching.py     the driver beside the running trainer: progress one way, Ctrl-C the other
worker.py       one rank: loads the model, builds everything, calls the loop, exports
loop.py         the loop and the step, without Ray
state.py        what a restart brings back
order.py        the list of micro-batches: a pure function of index and seed;  holdout.py  what is kept out of it
plan.py         which of them each step feeds to which rank, and what is due when
batches.py      rows of shards, noise and timesteps to batches, ahead of the step
model.py        what is trained, put together: U-Net, adapters, text encoders, masters
text.py         text encoders that are trained, and encode captions in each step
masters.py      fp32 master weights and the flat buffer of their gradients
optimizers.py   the optimizer by name, saved and resumed to the bit;  groups.py  which parameters learn how fast
lr_schedules.py the learning rate as a function of the step;  ema.py  a moving average;  scaling.py  fp16
checkpoints.py  written whole or not at all
eval_loss.py    a loss that can be compared from step to step
validation.py   images that can be compared from step to step
finish.py       the verified LoRA files and what their headers say
data.py         the samples of a run and its plan, without torch
preflight.py    what would stop a run, found out before it begins
batch_size.py   the largest micro-batch that fits, and accumulation from it;  try_out.py  tried out on a GPU
setup.py        everything one rank needs, built from the config and the data
synthetic.py    batches of random tensors, for benchmarks without a cache
"""
