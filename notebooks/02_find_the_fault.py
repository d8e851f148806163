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

import jaxref
import oracle
from weights import EMBEDDED, open_checkpoint

model = open_checkpoint(EMBEDDED)
tokens = [54, 71, 64, 83, 220, 17, 10, 17, 30, 64, 71, 54]
wrong = replace(model.config, rope_theta=500000.0)
engine = jaxref.forward(model.params(), tokens, wrong, "float16")  # {"layer-0": {"attn_norm": [S, D], …}, …}

# %% [markdown]
# That is all an engine has to do to take part: give its tensors by their stages' names. One in Python has them in a
# dictionary, NumPy's, JAX's or torch's; any other writes them into files, a folder a layer (`docs/engines.md`).
#
# ## Where does it begin?
#
# Two trees beside the engine's: the truth in float64, and the yardstick, which is what float16 alone does to the truth.

# %%
truth, yardstick = (jaxref.make_tree(model, tokens, dtype) for dtype in ("float64", "float16"))
result = oracle.compare(truth, engine, yardstick)
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
