"""The finished LoRA as files that other programs read.

names       the same module in three languages: diffusers, sgm, kohya            (strings only)
metadata    what the header says: `ss_*`, `modelspec.*`
formats     one adapter as a kohya file and as a diffusers file
verify      each file loaded back and compared with the trained U-Net; `export_adapter` is the whole stage
model_card  README.md beside them, as the Hub shows it
"""
