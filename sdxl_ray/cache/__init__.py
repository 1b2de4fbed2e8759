"""Stage 1: images and captions to encoded shards. Files in the order in which data meets them.

sources/         folder, tar files, tables, Hugging Face; local or in cloud storage -> images, listed but not opened
scan.py          images -> content hash and size; unreadable ones with their reason       memo.py: what is known already
captions.py      images -> captions, never the wrong one                                  caption_files.py: one file
caption_variants.py  tags shuffled and left out; trigger word, prefix, suffix             text_memo.py: of cloud files
buckets.py       size -> bucket, resize, crops
judge.py         is an image used, and if not, why?                                       skipped.py: what is left out
collection.py    all of these, in pieces -> columns                                       tables.py: large ones on disk
ragged.py        rows of different lengths in two arrays
planning.py      what the cache should hold, and what is still missing (no Ray, no torch)
missing.py       keys that no shard has -> shards to be encoded
formats.py       bytes -> an opened image, with the plug-in that it needs
images.py        file -> pixels: colour, orientation, resize, crop
masks.py         transparency or a mask file -> what counts                               reading.py: both, or why not
encode.py        pixels -> VAE posterior; captions -> embeddings of both text encoders
shards.py        tensors -> content-addressed .safetensors files
shard_reader.py  key -> the tensors of its entry, checked                                 local_copies.py: of a cloud
store.py         key -> shard
jobs/            all of this on Ray Data: tasks and actors, their share of a cluster, what did not come back
pipeline.py      the whole stage; in the background of a run with cache.mode = "ondemand"
index.py         index.parquet: one row per sample                                        foreseen.py: of a plan
generations.py   the folder of an index: named by its content, so written once
live.py          one image or caption, encoded on the spot by a training worker
maintenance.py   what is in a cache folder, is it whole, what is unused
preview.py       the contact sheet
"""
