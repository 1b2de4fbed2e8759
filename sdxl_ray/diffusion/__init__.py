"""The mathematics, pure torch: no model, no files, no Ray. All randomness comes in as arguments.

randomness.py  draws that are a function of a key: the same on every machine, whatever the number of workers
schedule.py    the forward process: alphas_cumprod, signal-to-noise ratio, zero terminal SNR
timesteps.py   which noise level each sample gets: distribution, bias, limits, strata
noise.py       the noise of a sample: white, offset, multires, and the perturbation that is only seen
objectives.py  epsilon, v_prediction and sample: corruption and target
weighting.py   how much each noise level counts
distances.py   how far a prediction is from its target: mse, mae, huber, smooth_l1
loss.py        the loss of each sample, shared by training, evaluation and tests
"""
