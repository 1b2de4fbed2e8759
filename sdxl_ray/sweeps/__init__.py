"""Stage 3: many short runs over one cache.

search_space.py  the [sweep] section in Ray Tune's terms
ranking.py       what the trials came to: a ranked table, the best settings, the best checkpoint
tuner.py         the driver: one cache, trials that are plain `fit` runs, ASHA, the best LoRA
"""
