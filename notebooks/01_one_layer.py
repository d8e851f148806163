# %% [markdown]
# # One layer, stage by stage
#
# What does a language model compute between two tokens? This notebook runs one forward pass, keeps every
# intermediate, and looks at those of one layer: how large they are, which channels stand out, where attention looks.
#
# It runs on a tiny built-in Qwen2 with random weights, so that nothing is downloaded. Set the environment variable
# `JAXREF_MODEL` to a folder, a `.gguf` file or the id of a cached model to see a real one.

# %%
import os
import subprocess
import sys
import tempfile

import jaxref
import matplotlib.pyplot as plt
import numpy as np
import treescope
from jaxref.stages import stages_of
from weights import EMBEDDED, open_checkpoint

MODEL = os.environ.get("JAXREF_MODEL", str(EMBEDDED))
PROMPT = "What is 2+2?"
plt.rcParams |= {"figure.dpi": 80, "font.size": 9, "figure.constrained_layout.use": True}

# %% [markdown]
# ## Load
#
# A checkpoint is opened without being read. Its tokenizer makes token ids of the prompt, raw: no chat template.

# %%
model = open_checkpoint(MODEL)
config, tokenizer = model.config, model.tokenizer()
tokens = tokenizer.encode(PROMPT)
words = [tokenizer.decode([token]).replace(" ", "␣") for token in tokens]
dims = ", ".join(f"{letter} {size}" for letter, size in config.dims().items() if size)
print(f"{model.name}: a {config.model_type} with {dims}")
print(f"{len(tokens)} tokens: {words}")

# %% [markdown]
# ## Forward
#
# `jaxref.forward` is a pure function of the weights, the tokens and the config. It returns every stage of every layer as
# a pytree, a dictionary of dictionaries. Run live, the next cell shows it as a tree to unfold.

# %%
trace = jaxref.forward(model.params(), tokens, config)
treescope.show(trace)
print(", ".join(trace))

# %% [markdown]
# The stage table says what a layer holds and in which order. `S` counts positions, `D` channels of the hidden state, `H`
# and `K` query and key/value heads of `h` channels, `F` units of the feed-forward part.

# %%
LAYER = config.num_hidden_layers // 2
layer = {stage.name: trace[f"layer-{LAYER}"][stage.name] for stage in stages_of(config, LAYER)}
for stage in stages_of(config, LAYER):
    print(f"{stage.name:19} [{', '.join(stage.axes)}]".ljust(35), f"{layer[stage.name].shape!s:13}", stage.meaning)

# %% [markdown]
# ## How large are they?
#
# A line from the root mean square to the greatest magnitude of each stage. The longer it is, the more a few values
# stand out, and the less a single bound on the absolute error says: this is why `oracle compare` judges relative errors.

# %%
names = list(layer)[::-1]
sizes = [np.abs(np.asarray(layer[name], np.float64)) for name in names]
rms = [np.sqrt(np.mean(x**2)) for x in sizes]
peak = [x.max() for x in sizes]
fig, ax = plt.subplots(figsize=(7, 4.2))
ax.hlines(names, rms, peak, color="0.7", linewidth=3)
ax.plot(rms, names, "o", color="C0", label="root mean square")
ax.plot(peak, names, "D", color="C1", label="greatest magnitude")
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter("{x:g}")
ax.set(title=f"layer {LAYER}", xlabel="magnitude")
ax.grid(axis="x", alpha=0.3)
fig.legend(loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# ## The residual stream, and what is massive in it
#
# Each layer adds two vectors to the hidden state: attention's and the feed-forward part's. In trained models a few
# values of it become *massive* (arXiv:2402.17762). Random weights have nothing of the kind; Qwen2.5-Coder-0.5B-Instruct
# does: on it, the second cell from here finds 1112 in channel 62 of the first token, 4105 times the median magnitude.

# %%
stream = [np.asarray(trace[f"layer-{n}"]["post_ffn_residual"], np.float64) for n in range(config.num_hidden_layers)]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(1, 2))
left.plot([np.abs(x).max() for x in stream], "D-", color="C1", label="greatest magnitude")
left.plot([np.sqrt(np.mean(x**2)) for x in stream], "o-", color="C0", label="root mean square")
left.set_yscale("log", base=2)
left.yaxis.set_major_formatter("{x:g}")
left.set(xlabel="layer", title="hidden state after each layer")
left.xaxis.get_major_locator().set_params(integer=True)
left.grid(axis="y", alpha=0.3)
left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False)
image = right.imshow(np.abs(stream[LAYER]), aspect="auto", cmap="magma", interpolation="nearest")
right.set(xlabel="channel", title=f"its magnitude after layer {LAYER}", yticks=range(len(words)), yticklabels=words)
fig.colorbar(image)
plt.show()

# %%
hidden = stream[LAYER]
token, channel = np.unravel_index(np.abs(hidden).argmax(), hidden.shape)
share = hidden[token, channel] ** 2 / (hidden[token] ** 2).sum()
print(f"greatest: {hidden[token, channel]:.4g}, at token {token} ({words[token]!r}), channel {channel}")
print(f"it is {abs(hidden[token, channel]) / np.median(np.abs(hidden)):.1f} times the median magnitude")
print(f"and {share:.1%} of its token's squared length")

# %% [markdown]
# A massive channel hides all others from a figure over the whole tensor. This is why `oracle compare` also takes the
# median over channels of each channel's own relative error.
#
# ## Attention
#
# `attn_scores` are the products of queries and keys *before* the causal mask; `attn_softmax` is what is left of them
# after it. Below the scores are drawn where a query (row) may see the key (column).

# %%
scores, weights = np.asarray(layer["attn_scores"]), np.asarray(layer["attn_softmax"])
heads = min(6, config.num_attention_heads)
seen = np.tril(np.ones(scores.shape[1:], bool))
fig, axes = plt.subplots(2, heads, figsize=(1.6 * heads, 3.6), sharex=True, sharey=True)
for head in range(heads):
    axes[0, head].imshow(np.where(seen, scores[head], np.nan), cmap="cividis")
    axes[1, head].imshow(weights[head], cmap="magma", vmin=0, vmax=1)
    axes[0, head].set_title(f"head {head}")
axes[0, 0].set_ylabel("attn_scores")
axes[1, 0].set_ylabel("attn_softmax")
plt.setp(axes, xticks=[], yticks=range(len(words)), yticklabels=words)
plt.show()

# %%
for head in range(heads):
    later = weights[head, 1:]
    first, itself = later[:, 0].mean(), np.diag(weights[head])[1:].mean()
    print(f"head {head}: {first:6.1%} of the weight goes to the first token, {itself:6.1%} to the token itself")

# %% [markdown]
# In trained models many heads put most of their weight on the first token (an *attention sink*, arXiv:2309.17453); these
# random ones spread it.
#
# ## The same from files
#
# Engines are not written in Python, so the trace is also a folder of files, one a stage. `load_tree` opens such a
# folder, of any producer; an array is mapped from its file when it is asked for, and knows the names of its axes.

# %%
with tempfile.TemporaryDirectory() as folder:
    command = ["jaxref", "dump", MODEL, "--prompt", PROMPT, "--output", folder, "--quiet"]
    subprocess.run([sys.executable, "-m", *command], check=True)
    tree = jaxref.load_tree(folder)
    stored = tree[f"layer-{LAYER}"]["attn_softmax"]
    print(stored)
    print("greatest difference from the trace:", np.abs(stored - weights).max())

# %% [markdown]
# Next: `02_find_the_fault` compares such a folder with an engine's, and `03_experts` looks into a mixture of experts.
