"""Feed-forward layers of the Vision Transformer: dense, mixture of stored experts, mixture of rotated ternary experts.

All three map (B, T, D) to (B, T, D) and return a `RouterReport` (None from the dense layer) beside it. Parameters are
float32; activations and matrix products have `config.compute_dtype`.

Axes: B batch, T tokens, D d_model, F d_ff, E experts, K experts selected per token, A angles of one rotation.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from bvit_jax import butterfly, dispatch, packing, precision, routing, ternary
from bvit_jax.model_config import ModelConfig

FfnOutput = tuple[jax.Array, routing.RouterReport | None]

_kernel_init = nn.initializers.xavier_uniform()
_expert_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=-2, out_axis=-1, batch_axis=(0,))
_router_init = nn.initializers.normal(0.02)


class DenseMlp(nn.Module):
    """y = W_down gelu(W_up x + b_up) + b_down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool, weight_B: jax.Array | None = None) -> FfnOutput:
        del train, weight_B
        dtype = self.config.compute_dtype
        h_BxTxF = nn.gelu(nn.Dense(self.config.d_ff, dtype=dtype, kernel_init=_kernel_init, name="up")(x_BxTxD))
        return nn.Dense(self.config.d_model, dtype=dtype, kernel_init=_kernel_init, name="down")(h_BxTxF), None


class Router(nn.Module):
    """Linear router in float32; draws its noise from the `router` stream of random numbers when training."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, *, train: bool, weight_B: jax.Array | None
    ) -> tuple[routing.Routing, routing.RouterReport]:
        kernel_DxE = self.param("kernel", _router_init, (x_BxTxD.shape[-1], self.config.num_experts))
        kernel_DxE = precision.quantise(kernel_DxE, self.config.router_precision)
        logits_BxTxE = x_BxTxD.astype(jnp.float32) @ kernel_DxE
        noise_BxTxE = None
        if train and self.config.router_noise > 0:
            noise_BxTxE = self.config.router_noise * jax.random.normal(self.make_rng("router"), logits_BxTxE.shape)
        routed = routing.select(logits_BxTxE, self.config.top_k, noise_BxTxE)
        return routed, routing.report(logits_BxTxE, routed, self.config.grid, weight_B)


class StandardMoe(nn.Module):
    """Mixture of stored experts, each an FFN with biases of its own. Exact: no capacity, no token dropped.

    The grouped products go by `jax.lax.ragged_dot`, and on CPUs by blocks (`bvit_jax.dispatch`); the choice is made
    when the program is lowered, for the platform that it is lowered for.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool, weight_B: jax.Array | None = None) -> FfnOutput:
        c = self.config
        routed, report = Router(c, name="router")(x_BxTxD, train=train, weight_B=weight_B)
        parameters = (
            self.param("up_kernel", _expert_init, (c.num_experts, c.d_model, c.d_ff)),
            self.param("up_bias", nn.initializers.zeros, (c.num_experts, c.d_ff)),
            self.param("down_kernel", _expert_init, (c.num_experts, c.d_ff, c.d_model)),
            self.param("down_bias", nn.initializers.zeros, (c.num_experts, c.d_model)),
        )
        dtype = jnp.dtype(c.compute_dtype)
        rows_NxD = _one_row_per_choice(x_BxTxD, c.top_k).reshape(-1, c.d_model).astype(dtype)
        expert_N = routed.experts_BxTxK.reshape(-1)
        block = dispatch.default_block(expert_N.shape[0], c.num_experts)
        operands = (rows_NxD, expert_N, *(p.astype(dtype) for p in parameters))
        y_NxD = jax.lax.platform_dependent(
            *operands, cpu=_stored_experts_by(block), default=_stored_experts_by(block=0)
        )
        return _combine(y_NxD.reshape(*routed.gates_BxTxK.shape, c.d_model), routed), report


def _stored_experts_by(block: int) -> Callable[..., jax.Array]:
    """Returns the FFN of stored experts over rows, by `blocks` of that height or, for 0, by `ragged` products."""

    def apply(
        rows_NxD: jax.Array,
        expert_N: jax.Array,
        up_ExDxF: jax.Array,
        up_bias_ExF: jax.Array,
        down_ExFxD: jax.Array,
        down_bias_ExD: jax.Array,
    ) -> jax.Array:
        grouping = dispatch.group(expert_N, up_ExDxF.shape[0], block)
        x_SxD = dispatch.to_slots(rows_NxD, grouping)
        h_SxF = dispatch.grouped_matmul(x_SxD, up_ExDxF, grouping) + up_bias_ExF[grouping.expert_S]
        y_SxD = dispatch.grouped_matmul(nn.gelu(h_SxF), down_ExFxD, grouping) + down_bias_ExD[grouping.expert_S]
        return dispatch.to_rows(y_SxD, grouping)

    return apply


class ButterflyMoe(nn.Module):
    """Mixture of experts that are rotations of shared ternary matrices: W_i = B(phi_i) W_q B(theta_i)^T.

    Forms (`config.form`), for one expert i:

    - `separate`: y = W_down,i gelu(W_up,i x + b_up) + b_down; two prototypes, each with its own pair of rotations.
    - `tied`: y = W_i^T gelu(W_i x + b_up) + b_down; one prototype and one pair, used in both directions.
    - `reference`: h = sum_k gate_k B(theta_i) W_q B(phi_i) x, y = W_out h + b_out; no nonlinearity, and a dense d_ff ->
      d_model projection W_out shared by all experts, as in the public PyTorch code.

    Biases are shared by all experts. Every row (token x choice) is turned by its own expert's angles, and one dense
    product with the prototype serves them all, so the cost does not grow with the number of experts.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool, weight_B: jax.Array | None = None) -> FfnOutput:
        c = self.config
        routed, report = Router(c, name="router")(x_BxTxD, train=train, weight_B=weight_B)
        x_BxTxKxD = _one_row_per_choice(x_BxTxD, c.top_k).astype(c.compute_dtype)
        expert = routed.experts_BxTxK
        if c.form == "reference":
            return self._reference(x_BxTxKxD, routed), report
        y_BxTxKxD = self._tied(x_BxTxKxD, expert) if c.form == "tied" else self._separate(x_BxTxKxD, expert)
        return _combine(y_BxTxKxD, routed), report

    def _separate(self, x: jax.Array, expert: jax.Array) -> jax.Array:
        c = self.config
        theta_up, phi_up = self._rotation("up_theta", c.d_model, expert), self._rotation("up_phi", c.d_ff, expert)
        theta_down, phi_down = (
            self._rotation("down_theta", c.d_ff, expert),
            self._rotation("down_phi", c.d_model, expert),
        )
        h = phi_up(theta_up(x, True) @ self._prototype("up_prototype", c.d_model, c.d_ff), False)
        h = nn.gelu(h + self._bias("up_bias", c.d_ff))
        y = phi_down(theta_down(h, True) @ self._prototype("down_prototype", c.d_ff, c.d_model), False)
        return y + self._bias("down_bias", c.d_model)

    def _tied(self, x: jax.Array, expert: jax.Array) -> jax.Array:
        c = self.config
        theta, phi = self._rotation("theta", c.d_model, expert), self._rotation("phi", c.d_ff, expert)
        prototype_DxF = self._prototype("prototype", c.d_model, c.d_ff)
        h = nn.gelu(phi(theta(x, True) @ prototype_DxF, False) + self._bias("up_bias", c.d_ff))
        return theta(phi(h, True) @ prototype_DxF.T, False) + self._bias("down_bias", c.d_model)

    def _reference(self, x: jax.Array, routed: routing.Routing) -> jax.Array:
        c = self.config
        expert = routed.experts_BxTxK
        phi, theta = self._rotation("phi", c.d_model, expert), self._rotation("theta", c.d_ff, expert)
        h = theta(phi(x, False) @ self._prototype("prototype", c.d_model, c.d_ff), False)
        projection = nn.Dense(c.d_model, dtype=c.compute_dtype, kernel_init=_kernel_init, name="projection")
        return projection(_combine(h, routed))

    def _prototype(self, name: str, inputs: int, outputs: int) -> jax.Array:
        weights_IxO = self.param(name, _kernel_init, (inputs, outputs))
        if self.config.ternary_scale != "none":
            weights_IxO = ternary.quantise(weights_IxO, self.config.ternary_scale)
        return weights_IxO.astype(self.config.compute_dtype)

    def _bias(self, name: str, size: int) -> jax.Array:
        return self.param(name, nn.initializers.zeros, (size,)).astype(self.config.compute_dtype).reshape(1, 1, 1, size)

    def _rotation(self, name: str, dim: int, expert: jax.Array) -> Callable[[jax.Array, bool], jax.Array]:
        """Makes the angles of all experts, (E, A), and returns (x, inverse) -> B x or B^T x, each row by its expert."""
        c = self.config
        stages = butterfly.make_stages(dim, min(c.num_stages, butterfly.max_stages(dim)), c.stride_order)
        shape = (c.num_experts, butterfly.num_angles(stages))
        angles_ExA = packing.quantise_angles(self.param(f"{name}_angles", _uniform(c.angle_init), shape), c.angle_bits)
        return lambda x, inverse: butterfly.rotate(x, angles_ExA, stages, inverse=inverse, expert=expert)


def _uniform(limit: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def _one_row_per_choice(x_BxTxD: jax.Array, top_k: int) -> jax.Array:
    batch, tokens, d_model = x_BxTxD.shape
    return jnp.broadcast_to(x_BxTxD[:, :, None], (batch, tokens, top_k, d_model))


def _combine(y_BxTxKxF: jax.Array, routed: routing.Routing) -> jax.Array:
    """Sums the experts' outputs by their gates, in float32; the dtype of `y_BxTxKxF` comes back."""
    total = jnp.einsum("btkf,btk->btf", y_BxTxKxF, routed.gates_BxTxK, preferred_element_type=jnp.float32)
    return total.astype(y_BxTxKxF.dtype)
