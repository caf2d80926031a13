"""Makes a folder of a checkpoint that mistral.rs reads: the same files, with fields in the configuration that it wants.

    python folder.py MODEL_DIR NEW_DIR
"""

import json
import sys
from pathlib import Path

model, new = map(Path, sys.argv[1:])
new.mkdir()
for file in model.iterdir():
    if file.name != "config.json":
        (new / file.name).symlink_to(file)
config = json.loads((model / "config.json").read_text())
config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta"))
# Layers beyond it would have a sliding window, which the model does not use.
config.setdefault("max_window_layers", config["num_hidden_layers"])
(new / "config.json").write_text(json.dumps(config))
