"""What of stage 1 runs on Ray: the jobs on the driver, and what they run on the nodes.

ray_jobs.py      the jobs: scan, captions, images. Each hands its results back as they come
waves.py         the missing shards, as one Ray Data job after another
ray_rows.py      the rows of a job, and in one line what went wrong with it
lost_shards.py   shards that did not come back: which of their images are at fault?
room.py          does a job wait for cores or GPUs that are not free?
pools.py         how much of a cluster encoders take (no Ray)
scanning.py      the scan on the nodes: work items and results (no Ray)
actors.py        decode tasks and encoding actors (no Ray)
reports.py       what travels between driver and nodes: work items, reports of shards, errors as text (no Ray)
"""
