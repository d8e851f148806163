# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Find the fault
#
# An engine answers nonsense. Its authors have dumped its tensors; here we play the engine, so that we know what is
# wrong with it: its RoPE base is 500000, and the checkpoint says 10000. Everything runs on the built-in tiny Qwen2.

# %%
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import jaxref
import numpy as np
import oracle
from jaxref.aprt import aprt_header
from weights import EMBEDDED, open_checkpoint

model = open_checkpoint(EMBEDDED)
tokens = [54, 71, 64, 83, 220, 17, 10, 17, 30, 64, 71, 54]
scratch = TemporaryDirectory()
folder = Path(scratch.name)

# %% [markdown]
# What an engine has to do to take part: twelve bytes and its floats, a file a stage.


# %%
def write(trace: dict, tree: Path) -> Path:
    for key, value in trace.items():
        stages = value if isinstance(value, dict) else {key: value}
        layer = int(key.removeprefix("layer-")) if isinstance(value, dict) else None
        for stage, x in stages.items():
            path = tree / (key if layer is not None else "") / f"{stage}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(aprt_header(layer, x.shape) + np.asarray(x, "<f4").tobytes())
    return tree


wrong = replace(model.config, rope_theta=500000.0)
engine = write(jaxref.forward(model.params(), tokens, wrong, "float16"), folder / "engine")

# %% [markdown]
# ## Where does it begin?
#
# Two trees beside the engine's: the truth in float64, and the yardstick, which is what float16 alone does to the truth.

# %%
from jaxref.dump import Job, dump
from jaxref.precision import numerics_of
from jaxref.selection import Selection, parse_layers, parse_stages


def reference(dtype: str) -> Path:
    config = model.config
    layers = parse_layers("all", config.num_hidden_layers)
    selection = Selection(config, len(tokens), parse_stages("all", config), layers)
    dump(Job(model, tokens, selection, numerics_of(dtype), folder / dtype))
    return folder / dtype


result = oracle.compare(reference("float64"), engine, reference("float16"))
print(result.first.key, "after", result.last_good)

# %% [markdown]
# The staircase: the error of every stage, against the truth, in computation order. The yardstick shows how much of it
# float16 is to blame for.

# %%
figure = result.plot()
figure

# %% [markdown]
# ## Which stages are wrong in themselves?
#
# After the first divergence everything is off, since everything inherits it. `localize` computes each stage from the
# engine's own inputs instead: what is wrong then is that stage's own doing.

# %%
from oracle.localize import localize

found = localize(model, engine, tokens)
for fault in found.faults:
    print(fault.stage, fault.layers, f"own error {fault.worst.local:.2g}, rounding makes {fault.worst.floor:.2g}")

# %% [markdown]
# ## And what is wrong with them?

# %%
from oracle.explain import explain

for cause in explain(model, engine, tokens).causes:
    print(cause.stage, cause.layers, cause.explanation.text, f"leaves {cause.explanation.residual:.1g}")
