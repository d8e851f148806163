# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Experts: which token goes where
#
# Qwen3-MoE sends each token through a few experts of each layer. A tiny random model is made here; set `JAXREF_MODEL`
# to one of your own.

# %%
import os
from pathlib import Path
from tempfile import mkdtemp

import jaxref
import matplotlib.pyplot as plt
import numpy as np
from weights import open_checkpoint
from weights.tiny import tiny_config, write_random

folder = os.environ.get("JAXREF_MODEL")
if folder is None:
    folder = Path(mkdtemp()) / "tiny-moe"
    write_random(folder, tiny_config("qwen3_moe"), seed=1)
model = open_checkpoint(folder)
tokens = [(7 * i * i + 3 * i + 5) % 256 for i in range(24)]
trace = jaxref.forward(model.params(), tokens, model.config)
print(model.config.num_experts, "experts,", model.config.num_experts_per_tok, "a token")

# %% [markdown]
# ## The choice
#
# `moe_router_indices` [S, A] are the experts' ids, `moe_router` their weights. The picture has a row a token and a
# column an expert.

# %%
layer = trace["layer-2"]
ids, shares = np.asarray(layer["moe_router_indices"]), np.asarray(layer["moe_router"])
chosen = np.zeros((len(tokens), model.config.num_experts))
np.put_along_axis(chosen, ids, shares, axis=1)
figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
axes.imshow(chosen, cmap="cividis", vmin=0, vmax=1, aspect="auto")
axes.set(xlabel="expert", ylabel="token")
plt.show()

# %% [markdown]
# ## Near ties
#
# How far the last chosen logit lies above the first that was not chosen. Where that is less than what rounding does,
# another program may take another expert, and neither is wrong: everything after it is another computation.

# %%
logits = np.sort(np.asarray(layer["moe_router_logits"]), axis=1)[:, ::-1]
count = model.config.num_experts_per_tok
margin = logits[:, count - 1] - logits[:, count]
for token in np.argsort(margin)[:5]:
    print(f"token {token:2}: margin {margin[token]:.4f}, chosen {ids[token].tolist()}")

# %% [markdown]
# ## What float16 changes
#
# A token changes its experts only where its margin is smaller than what its logits move by. Once it has, every later
# layer computes something else for it, and its logits move by far more than float16 rounds.

# %%
half = jaxref.forward(model.params(), tokens, model.config, "float16")
for index in filter(model.config.is_moe, range(model.config.num_hidden_layers)):
    before, after = (t[f"layer-{index}"] for t in (trace, half))
    ours, theirs = (np.sort(np.asarray(layer["moe_router_indices"]), axis=1) for layer in (before, after))
    moved = np.abs(np.asarray(after["moe_router_logits"], np.float64) - np.asarray(before["moe_router_logits"]))
    elsewhere = int((ours != theirs).any(axis=1).sum())
    print(f"layer {index}: {elsewhere} of {len(tokens)} tokens go elsewhere, logits move by {moved.max():.4f}")
