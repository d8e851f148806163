# %% [markdown]
# # Experts: which token goes where
#
# In a mixture of experts a *router* scores all experts for each token, and only the best few compute. This notebook
# shows who is chosen, how near the decisions are, and what float16 makes of the near ones.
#
# It runs on a tiny Qwen3-MoE with random weights: 8 experts, 2 a token, in layers 0, 2 and 3. Its seed is one with which
# float16 changes some choice. Set `JAXREF_MODEL` to see a real model; experts are read one by one, so a large one fits.

# %%
import os
import tempfile
from pathlib import Path

import jaxref
import matplotlib.pyplot as plt
import numpy as np
import oracle
from weights import open_checkpoint
from weights.tiny import tiny_config, write_random

TEXT = "A router gives each token to two of eight experts. Where two of them are nearly as good, rounding decides."
STAGES = "moe_router_logits,moe_router,moe_router_indices,moe_ffn_out,post_ffn_residual"
scratch = tempfile.TemporaryDirectory()
SCRATCH = Path(scratch.name)
plt.rcParams |= {"figure.dpi": 80, "font.size": 9, "figure.constrained_layout.use": True}

# %%
MODEL = os.environ.get("JAXREF_MODEL")
if MODEL is None:
    MODEL = str(SCRATCH / "tiny")
    write_random(Path(MODEL), tiny_config("qwen3_moe"), seed=3)
model = open_checkpoint(MODEL)
config, tokens = model.config, model.tokenizer().encode(TEXT)
moe = [n for n in range(config.num_hidden_layers) if config.is_moe(n)]
E, A = config.num_experts, config.num_experts_per_tok
print(f"{model.name}: a {config.model_type} of {config.num_hidden_layers} layers")
print(f"{len(moe)} of them with {E} experts, {A} a token; {len(tokens)} tokens")

# %% [markdown]
# ## Two runs of the same model
#
# Once in float64, the ground truth, and once in float16 with the roundings that float16 inference has. By default the
# stages of experts are kept for the last position alone, as the engines do; here all are wanted.

# %%
wanted = {"stages": STAGES, "positions": "all"}
truth, half = (jaxref.make_tree(model, TEXT, dtype, **wanted) for dtype in ("float64", "float16"))
truth[f"layer-{moe[0]}"]

# %% [markdown]
# ## Who is chosen
#
# `moe_router_indices` are the chosen experts, best first, `moe_router` their weights. Spread over all experts, they are a
# map of which token goes where: each column has exactly as many coloured cells as a token has experts.

# %%
SHOWN = 48
ids = np.asarray(truth[f"layer-{moe[0]}"]["moe_router_indices"], int)
weights = np.zeros((len(tokens), E))
np.put_along_axis(weights, ids, truth[f"layer-{moe[0]}"]["moe_router"], axis=1)
letters = [model.tokenizer().decode([token]).replace(" ", "␣") for token in tokens[:SHOWN]]
fig, ax = plt.subplots(figsize=(9, 2.4))
image = ax.imshow(np.where(weights > 0, weights, np.nan)[:SHOWN].T, aspect="auto", cmap="viridis_r", vmin=0)
ax.set(title=f"layer {moe[0]}: weight of each chosen expert", ylabel="expert")
ax.set_xticks(range(len(letters)), letters, rotation=0 if max(map(len, letters)) < 2 else 90)
fig.colorbar(image)
plt.show()

# %% [markdown]
# Over the whole prompt: how many tokens each expert gets, against the share that a balanced router would give it. An
# engine must cope with both ends: experts that nobody chose, and one that nearly everybody did.

# %%
chosen = [np.asarray(truth[f"layer-{n}"]["moe_router_indices"], int) for n in moe]
load = np.array([np.bincount(ids.ravel(), minlength=E) for ids in chosen])
fair = len(tokens) * A / E
fig, ax = plt.subplots(figsize=(9, 1.2 + 0.2 * len(moe)))
image = ax.imshow(load / fair, aspect="auto", cmap="cividis", vmin=0)
ax.set(title="tokens of each expert, as a multiple of the fair share", xlabel="expert", ylabel="layer")
ax.set_yticks(range(len(moe)), moe)
fig.colorbar(image)
plt.show()

# %% [markdown]
# ## How near the decisions are
#
# The *margin* of a token is the logit of its last chosen expert less that of the best one not chosen. Rounding moves the
# logits; where it moves them by more than the margin, another expert may run. The margins are drawn sorted; the lines
# across are the median and the greatest error of a float16 logit in the first of these layers, where nothing is
# inherited from a swap.

# %%
exact = {n: np.asarray(truth[f"layer-{n}"]["moe_router_logits"]) for n in moe}
error = {n: np.abs(half[f"layer-{n}"]["moe_router_logits"] - exact[n]) for n in moe}
ranked = {n: -np.sort(-exact[n], axis=1) for n in moe}
margin = {n: ranked[n][:, A - 1] - ranked[n][:, A] for n in moe}
first = moe[0]
fig, ax = plt.subplots(figsize=(9, 3))
for n in moe[:4]:
    ax.plot(np.sort(margin[n]), label=f"margins, layer {n}")
ax.axhline(np.median(error[first]), color="k", linestyle=":", label="median error in float16")
ax.axhline(error[first].max(), color="k", linestyle="--", label="greatest error in float16")
ax.set(yscale="log", xlabel="tokens, nearest decision first", ylabel="logit")
fig.legend(loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# ## What float16 changes
#
# The tokens that get another set of experts in float16. Where the margin is of the size of the rounding error it is a
# *near tie*: nobody is wrong there. Where the error is far larger than rounding makes it, the token has inherited it from
# a swap in an earlier layer.

# %%
flips = []
for n in moe:
    theirs = np.asarray(half[f"layer-{n}"]["moe_router_indices"], int)
    ours = np.asarray(truth[f"layer-{n}"]["moe_router_indices"], int)
    for token in np.flatnonzero((np.sort(ours, axis=1) != np.sort(theirs, axis=1)).any(axis=1)):
        flips.append((n, int(token)))
        print(
            f"layer {n} token {token:3}: experts {ours[token].tolist()} become {theirs[token].tolist()};"
            f" margin {margin[n][token]:.2g}, error of its logits {error[n][token].max():.2g}"
        )
print(f"{len(flips)} of {len(moe) * len(tokens)} decisions")

# %% [markdown]
# One swap is no small thing for its token. Below is the relative error of the hidden state, token by token: rounding alone
# keeps it far below a percent, and a token whose expert was swapped (a ring) is off by tens of percents from there on.
# Later tokens see it through attention, a lighter shade. A figure over the whole tensor cannot tell this from a fault.

# %%
depth = range(config.num_hidden_layers)
off = []
for n in depth:
    ours, theirs = (np.asarray(tree[f"layer-{n}"]["post_ffn_residual"], float) for tree in (truth, half))
    off.append(np.linalg.norm(theirs - ours, axis=1) / np.linalg.norm(ours, axis=1))
fig, ax = plt.subplots(figsize=(9, 1.8 + 0.15 * len(off)))
image = ax.imshow(np.log10(off), aspect="auto", cmap="magma", interpolation="nearest")
ax.plot(
    [token for _, token in flips],
    [n for n, _ in flips],
    "o",
    markersize=11,
    fillstyle="none",
    color="cyan",
    label="another expert",
)
ax.yaxis.get_major_locator().set_params(integer=True)
ax.set(title="log10 of the hidden state's relative error in float16", xlabel="token", ylabel="layer")
ax.legend(loc="lower left", framealpha=0.9)
fig.colorbar(image)
plt.show()

# %% [markdown]
# `oracle compare` knows all this: experts are compared as sets, a swap at a near tie is noted and not failed, and what
# comes after it counts at the other tokens.

# %%
result = oracle.compare(truth, half)
print(result.verdict, "after", len(result.comparisons), "stages")
for found in result.comparisons:
    for note in found.notes:
        print(f"layer {found.key[0]} {found.key[1]}: {note}")
