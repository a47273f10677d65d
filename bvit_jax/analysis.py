"""Looking inside trained models and sweeps: from a checkpoint or a packed file, and images, to arrays and tables.

    from bvit_jax import analysis

    model = analysis.load("runs/digits")             # any run's directory, whatever wrote it, or a packed file
    images = model.images("test", 64)
    seen = analysis.route(model, images)
    analysis.agreement_table(seen)

All functions are pure: what they return depends on their arguments alone, and nothing is written. Tables are pandas
data frames whose columns their functions describe; pictures of them are in `routing_figures`, `expert_figures`,
`run_figures` and `sweep_figures`.
"""

from bvit_jax.diversity import Diversity, diversity_table, output_diversity, weight_diversity
from bvit_jax.favourites import Favourites, favourites
from bvit_jax.fits import Fit, fit, fit_table, series_fits
from bvit_jax.opened import Images, Opened, load
from bvit_jax.outliers import outlier_table
from bvit_jax.run_state import RunState
from bvit_jax.run_state import read as read_state
from bvit_jax.seen_routing import SeenRouting, label_shares, layer_table, load_table, route
from bvit_jax.spatial import agreement_table
from bvit_jax.sweep_results import means
from bvit_jax.sweep_results import read as read_sweeps
from bvit_jax.weight_tables import angle_table, angles, trit_table

__all__ = [
    "Diversity",
    "Favourites",
    "Fit",
    "Images",
    "Opened",
    "RunState",
    "SeenRouting",
    "agreement_table",
    "angle_table",
    "angles",
    "diversity_table",
    "favourites",
    "fit",
    "fit_table",
    "label_shares",
    "layer_table",
    "load",
    "load_table",
    "means",
    "outlier_table",
    "output_diversity",
    "read_state",
    "read_sweeps",
    "route",
    "series_fits",
    "trit_table",
    "weight_diversity",
]
