# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does the smoothness loss make routing smooth?
#
# Two runs of one seed, with weight 0 and 0.1; half a minute each on two CPU cores:
#
# ```bash
# python -m experiments.train --config=configs/digits.py --workdir=runs/smooth_0 --config.loss.smoothness=0.0
# python -m experiments.train --config=configs/digits.py --workdir=runs/smooth_0.1 --config.loss.smoothness=0.1
# ```
#
# For runs of your own change `RUNS`: any two or more that see the same images, by the names they are to have.

# %%
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator is for those that train

if not Path("bvit_jax").is_dir():  # Jupyter starts in notebooks/
    os.chdir("..")
sys.path.insert(0, str(Path.cwd()))

RUNS = {"weight 0": "runs/smooth_0", "weight 0.1": "runs/smooth_0.1"}

# %%
import pandas as pd
from IPython.display import Markdown, display

from bvit_jax import analysis, routing_figures

models = {name: analysis.load(path) for name, path in RUNS.items()}
images = next(iter(models.values())).images("test", 128)
seen = {name: analysis.route(model, images) for name, model in models.items()}

# %% [markdown]
# ## The same images, routed by each

# %%
for name, routed in seen.items():
    display(Markdown(f"### {name}"), routing_figures.routing_maps(routed, images))

# %% [markdown]
# ## Neighbours beside shuffled patches
#
# A regulariser that does its work lifts neighbours above the dashed line, not only both together: experts that take all
# patches of an image agree too, and say nothing of space. `excess` is the difference, `kappa` its share of what is left
# to 1; `distance` is what the loss is made of.

# %%
agreements = {name: analysis.agreement_table(routed) for name, routed in seen.items()}
for name, table in agreements.items():
    if len(table):  # an image of a single patch has no neighbours
        display(Markdown(f"### {name}"), routing_figures.agreement(table))

# %%
together = pd.concat(agreements, names=["run"]).reset_index(level="run")
together[together["direction"] == "both"].drop(columns="direction")

# %% [markdown]
# ## What it costs
#
# Smoother routing may mean that fewer experts are used, or that a router cares less.

# %%
pd.concat({name: analysis.layer_table(routed) for name, routed in seen.items()}, names=["run"]).reset_index(level="run")

# %%
rows = {name: analysis.read_state(path) for name, path in RUNS.items()}
pd.DataFrame({name: (state.result or {}) for name, state in rows.items()}).reindex(["test_accuracy", "test_nll"])
