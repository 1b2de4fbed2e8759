"""What the user asked for: one strict schema, read from TOML.

schema.py          every setting with its unit, range, default and reason: the only place where they are written down,
                   with data.py for datasets and the cache, methods.py for what is trained and how, made of fields.py
units.py           durations and shares that carry their unit ("2000 steps", "10 epochs", "5 %")
contradictions.py  settings that are fine alone but not together; method_contradictions.py  those of training methods
names.py           what datasets are called where nobody gave them a name
keys.py            dotted keys: which there are, where they stand in a file, which datasets they mean
problems.py        what is wrong with them, in a person's words
load.py            TOML + `key.path=value` overrides -> Config, with every problem reported at once
template.py        the commented file of `sdxl-ray init` and docs/configuration.md, generated from the schema
"""
