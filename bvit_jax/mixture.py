"""What mixtures of experts have in common, whatever their experts are: the router, the weighted sum, rows.

Axes: B batch, T tokens, D d_model, E experts, K experts selected per token, N rows (tokens x choices), F outputs.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bvit_jax import precision, routing, sharding
from bvit_jax.model_config import ModelConfig

FfnOutput = tuple[jax.Array, routing.RouterReport | None]

_router_init = nn.initializers.normal(0.02)


class Router(nn.Module):
    """Linear router in float32; draws its noise from the `router` stream of random numbers when training."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, *, train: bool, weight_B: jax.Array | None
    ) -> tuple[routing.Routing, routing.RouterReport]:
        init, shape = sharding.named(_router_init, "embed", "routes"), (x_BxTxD.shape[-1], self.config.num_experts)
        kernel_DxE = self.param("kernel", init, shape)
        kernel_DxE = precision.quantise(kernel_DxE, self.config.router_precision)
        logits_BxTxE = x_BxTxD.astype(jnp.float32) @ kernel_DxE
        noise_BxTxE = None
        if train and self.config.router_noise > 0:
            noise_BxTxE = self.config.router_noise * jax.random.normal(self.make_rng("router"), logits_BxTxE.shape)
        routed = routing.select(logits_BxTxE, self.config.top_k, noise_BxTxE)
        return routed, routing.report(logits_BxTxE, routed, self.config.grid, weight_B)


def in_each_shard(
    experts: Callable[..., jax.Array], params: dict[str, jax.Array], x_BxTxD: jax.Array, expert_BxTxK: jax.Array
) -> jax.Array:
    """Applies experts that every device holds to the tokens of each device where they are.

    The gradient of a parameter is summed up within each device, wherever it is used, and over devices once.
    """
    mesh = sharding.active_mesh()
    if mesh is None:
        return experts(params, x_BxTxD, expert_BxTxK)
    rows, whole = sharding.split("rotated_batch"), PartitionSpec()
    by_shard = jax.shard_map(experts, mesh=mesh, in_specs=(whole, rows, rows), out_specs=rows, check_vma=False)
    return by_shard(params, x_BxTxD, expert_BxTxK)


def rows(x_BxTxD: jax.Array, top_k: int) -> jax.Array:
    """Repeats each token for its K experts, (N, D)."""
    batch, tokens, d_model = x_BxTxD.shape
    return jnp.broadcast_to(x_BxTxD[:, :, None], (batch, tokens, top_k, d_model)).reshape(-1, d_model)


def combine(y_BxTxKxF: jax.Array, routed: routing.Routing) -> jax.Array:
    """Sums the experts' outputs by their gates, in float32; the dtype of `y_BxTxKxF` comes back."""
    gated = (
        y_BxTxKxF[:, :, choice].astype(jnp.float32) * routed.gates_BxTxK[:, :, choice, None]
        for choice in range(y_BxTxKxF.shape[2])
    )
    return functools.reduce(jnp.add, gated).astype(y_BxTxKxF.dtype)
