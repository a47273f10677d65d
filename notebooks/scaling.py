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
# # Curves over the number of experts
#
# Its input is a sweep, finished or not, or several to be compared. This one takes some minutes on two CPU cores:
#
# ```bash
# python -m experiments.sweep --workdir=runs/sweep_digits
# ```
#
# For sweeps of your own change `SWEEPS`; several stand side by side, each curve after its sweep's name.

# %%
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator is for those that train

if not Path("bvit_jax").is_dir():  # Jupyter starts in notebooks/
    os.chdir("..")
sys.path.insert(0, str(Path.cwd()))

SWEEPS = ["runs/sweep_digits"]

# %%
from IPython.display import display

from bvit_jax import analysis, sweep_figures

results = analysis.read_sweeps(*SWEEPS)
results["status"].value_counts()

# %% [markdown]
# ## What is missing
#
# Trials that failed, are going on or have not begun. Those without a test accuracy are left out of the curves.

# %%
shown = ["sweep", "trial", "series", "num_experts", "seed", "status", "test_accuracy", "error"]
results.loc[results["status"] != "ok", shown]

# %% [markdown]
# ## The curves, and the laws fitted to them
#
# Accuracy `a + b log2 E`, NLL and bytes `a E^b`; intervals are 95 %, over single runs.

# %%
means = analysis.means(results)
fits = analysis.series_fits(results)
display(*sweep_figures.curves(results, means, fits))

# %%
analysis.fit_table(fits)

# %%
means
