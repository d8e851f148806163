# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # One layer, every stage
#
# A forward pass that returns everything: a pytree whose paths are those of a dumped tree. It runs on the built-in tiny
# Qwen2; set `JAXREF_MODEL` to a checkpoint of your own.

# %%
import os

import jaxref
import matplotlib.pyplot as plt
import numpy as np
import treescope
from jaxref.stages import STAGES
from weights import EMBEDDED, open_checkpoint

model = open_checkpoint(os.environ.get("JAXREF_MODEL", EMBEDDED))
tokens = [54, 71, 64, 83, 220, 17, 10, 17, 30]
trace = jaxref.forward(model.params(), tokens, model.config)
print(model.name, model.config.dims())

# %% [markdown]
# `trace["layer-1"]` holds the stages of layer 1. The order is that of `jaxref/stages.py`, never that of the dict.

# %%
layer = trace["layer-1"]
print(treescope.render_to_text({name: trace[name] for name in ("layer-1", "final_norm", "lm_head")}))

# %%
for name in (name for name in STAGES if name in layer):
    x = np.asarray(layer[name])
    print(f"{name:19} {list(x.shape)!s:12} rms {np.sqrt((x**2).mean()):8.4f}  largest {np.abs(x).max():8.4f}")

# %% [markdown]
# ## What heads look at
#
# `attn_softmax` [H, S, S]: for each query head and each query (down) the weights of the keys (across).

# %%
maps = np.asarray(layer["attn_softmax"])
figure, many = plt.subplots(1, len(maps), figsize=(8, 2), layout="constrained")
for axes, head in zip(many, maps, strict=True):
    axes.imshow(head, cmap="cividis", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])

# %% [markdown]
# ## Which channels carry the residual stream
#
# In trained models a few channels are hundreds of times larger than the rest, and carry every cosine. In this random
# one they are nearly alike; with a real model in `JAXREF_MODEL` the peaks stand out.

# %%
hidden = np.abs(np.asarray(layer["post_ffn_residual"])).max(axis=0)
figure, axes = plt.subplots(figsize=(8, 2), layout="constrained")
axes.plot(np.sort(hidden)[::-1])
axes.set(xlabel="channel, largest first", ylabel="greatest |value|", yscale="log")
plt.show()

# %% [markdown]
# ## What float16 changes
#
# The same stages with float16's roundings, relative L2 from float64.

# %%
truth, half = (jaxref.forward(model.params(), tokens, model.config, dtype) for dtype in ("float64", "float16"))
for name in (name for name in STAGES if name in layer):
    exact, rounded = (np.asarray(t["layer-1"][name], np.float64) for t in (truth, half))
    print(f"{name:19} {np.linalg.norm(rounded - exact) / np.linalg.norm(exact):.1e}")
