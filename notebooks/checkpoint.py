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
# # One model, in pictures
#
# Its input is a run, finished or not, or a packed file. This one takes half a minute on two CPU cores:
#
# ```bash
# python -m experiments.train --config=configs/digits.py --workdir=runs/digits
# ```
#
# For a run of your own change `WORKDIR`, and nothing else.

# %%
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an accelerator is for those that train

if not Path("bvit_jax").is_dir():  # Jupyter starts in notebooks/
    os.chdir("..")
sys.path.insert(0, str(Path.cwd()))

WORKDIR = "runs/digits"

# %%
from IPython.display import display

from bvit_jax import analysis, expert_figures, routing_figures, run_figures

# %% [markdown]
# ## How it was trained
#
# A packed file has no history.

# %%
if (Path(WORKDIR) / "config.json").is_file():
    state = analysis.read_state(WORKDIR)
    print(state.progress)
    display(run_figures.training(state))

# %% [markdown]
# ## Where patches go
#
# The first choice of every patch, and what each expert gets. A dense model routes nothing, and the second cell says so.

# %%
model = analysis.load(WORKDIR)
images = model.images("test", 64)
print(
    f"{model.model.family}, {model.model.num_experts} experts, step {model.step}, looked at with {len(images)} images"
)

# %%
seen = analysis.route(model, images)
display(routing_figures.routing_maps(seen, images))

# %%
loads = analysis.load_table(seen)
display(routing_figures.load(seen, loads))
analysis.layer_table(seen)

# %% [markdown]
# ## Did the experts specialise?
#
# By class of image, by what their patches look like, and by what they compute. The favourites are those of the last
# mixture layer.

# %%
display(routing_figures.labels(seen, analysis.label_shares(seen)))

# %%
display(routing_figures.favourites(analysis.favourites(seen)[-1], images, model.model.patch_size))

# %%
found = [*analysis.weight_diversity(model), *analysis.output_diversity(model, seen)]
table = analysis.diversity_table(found)
if len(table):  # of a single expert there is nothing to compare
    display(expert_figures.diversity(table), expert_figures.diversity_pairs(found))
table

# %% [markdown]
# ## Is routing smooth in space?
#
# Neighbouring patches beside patches from anywhere in the image; `notebooks/routing.py` compares two runs.

# %%
near = analysis.agreement_table(seen)
if len(near):
    display(routing_figures.agreement(near))
near

# %% [markdown]
# ## What the experts are made of
#
# Angles and ternary weights, and what the rotations do to outliers among the inputs. Families without them have no
# pictures here.

# %%
angles = analysis.angles(model)
if angles:
    display(expert_figures.angles(angles), analysis.angle_table(model))

# %%
trits = analysis.trit_table(model)
if len(trits):
    display(expert_figures.trits(trits), trits)

# %%
outliers = analysis.outlier_table(model, seen)
if len(outliers):
    display(expert_figures.outliers(outliers), outliers)
