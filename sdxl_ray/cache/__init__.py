"""Stage 1: images and captions to encoded shards. Files in the order in which data meets them.

scan.py      folder -> files with content hash and size; unreadable ones with their reason
captions.py  files -> captions, never the wrong one
buckets.py   size -> bucket, resize, crop
images.py    file -> pixels: colour, orientation, resize, crop
encode.py    pixels -> VAE posterior; captions -> embeddings of both text encoders
shards.py    tensors <-> content-addressed .safetensors files; the index
planning.py  what the cache should hold, and what is still missing (no Ray, no torch)
actors.py    what runs on the nodes: scan and decode tasks, encoding actors (no Ray)
pipeline.py  the missing shards through Ray Data
manifest.py  what an index was made with, and where the embeddings of prompts lie
"""
