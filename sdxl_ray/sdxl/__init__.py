"""The network: SDXL's parts, and every call that goes into one of them.

components      load U-Net, VAE and text encoders from a folder or the Hub                  <- start here
fingerprint     what a part is, as a hash and as shapes, without torch      (reached through components)
digests         sha256 of model files, each read once per machine            (reached through fingerprint)
files, hub      which files make up a part; fetch them from the Hub          (reached through components)
text            captions -> prompt_embeds and pooled_prompt_embeds
vae             pixels <-> latents, as a posterior (mean and standard deviation)
tiling          decoding a large image in parts
conditioning    time ids, caption dropout, and the one place that calls the U-Net
adapters        the trained delta: attach, save, load, switch off, remove
adapter_layers  its layers, which are peft's; adapter_start  what they begin with       (reached through adapters)
targets         which layers get an adapter, with which rank, and how many parameters that is, without torch
trained         what training made of each layer, without the model
full            the U-Net itself trained, without an adapter
quantize        frozen weights in int8, int4 or fp8                                (the only user of quanto)
checkpointing   which activations are recomputed in the backward pass;  compiling  the transformer blocks compiled
sampling        images from U-Net and embeddings; the labelled sheet that compares them
devices         which device and which precision
quiet           diffusers and transformers report errors only
architecture    the true SDXL's configs; its U-Net with random weights, for scripts
tiny            a small SDXL with random weights, for tests, demos and `builtin:tiny`
"""
