"""What was trained, as files that other programs read.

which                which format can hold which kind, and why not others         (no torch)
spec, metadata       what was trained, and what the header says: `ss_*`, `modelspec.*`
names                the same module in three languages: diffusers, sgm, kohya     (strings only)
tensor_file          a safetensors file, written tensor by tensor
formats, lycoris     adapters as kohya files and as diffusers files
svd                  the plain LoRA that comes nearest to any of them
whole_model          the whole model with what was trained merged in, as one file or a folder
single_file_names    what its weights are called in one file
probe, reading_back, reading_back_whole   files loaded back and compared with what was trained
exporters            one format after another: written, read back, compared
verify               `export_adapter`, the whole stage
read                 the other direction: a LoRA file to go on from
model_card           README.md beside them, as the Hub shows it
"""
