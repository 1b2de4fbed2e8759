"""The mathematics, pure torch: no model, no files, no Ray. All randomness comes in as arguments.

randomness.py  draws that are a function of a key: the same on every machine, whatever the number of workers
schedule.py    the forward process: alphas_cumprod, signal-to-noise ratio
timesteps.py   which noise level each sample gets
objectives.py  epsilon and v_prediction: corruption and target
weighting.py   how much each noise level counts
loss.py        the loss of each sample, shared by training, evaluation and tests
"""
